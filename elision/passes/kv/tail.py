"""Caches whose older entries are encoded in blocks, behind a tail of floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from elision.errors import BadInput
from elision.ir.encoding import check
from elision.ir.program import Program
from elision.ir.states import KV, Budget, Dense, Encoding, Segment
from elision.ir.value import Builder, Value
from elision.passes.kv.caches import Cached


def behind_a_tail(
    program: Program, by: str, block: int, residual: int, encodings: Callable[[KV], tuple[Encoding, Encoding]]
) -> None:
    """Give every cache a first segment in ``encodings`` (of keys, of values), and after it the tail that rows are appended to, in
    floats as before: on the clock, every ``block`` tokens and after the prompt, whole blocks move from the tail as long as
    ``residual`` rows remain. While the prompt comes in the tail has room for all of it."""
    if residual < 0 or residual % block:
        raise BadInput(f"{by}: residual={residual}; expected a multiple of {block} tokens, which are flushed together, or 0")
    cached = Cached(program, by)
    cached.whole()

    def changed(type: KV) -> KV:
        k, v = encodings(type)
        check(k, type.dim)
        check(v, type.vdim)
        (main, *rest), tail = type.segments, Budget(residual + block, -1)
        return replace(type, segments=(Segment(Dense(), k, v), replace(main, slots=tail), *rest))

    def flush(b: Builder, rows: Value, cache: Value, pos: Value) -> Value:
        return b.add("flush", cache, rows, frm=1, to=0, n=block, keep=residual)  # type: ignore[no-any-return]

    cached.retype(changed)
    cached.on_tick(block, flush)
