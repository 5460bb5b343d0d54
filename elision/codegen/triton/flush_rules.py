"""The launches of a tick that moves whole blocks of a cache's tail to the segment before, in its encoding."""

from __future__ import annotations

from elision.codegen.refusal import need
from elision.codegen.triton.attention_rules import fixed_sizes, older, readable
from elision.codegen.triton.forms import form, group_of
from elision.codegen.triton.launches import ROWS, Arg, Launches, axis, cache, integer, size
from elision.ir.states import KV
from elision.ir.value import Value


def flush(to: Launches, name: str, value: Value) -> None:
    """Of the cache with this name, axis 0 being the sequences that are due."""
    state, block, keep = value.type, value.attr("n"), value.attr("keep", -1)
    assert isinstance(state, KV)
    need((value.attr("frm"), value.attr("to"), value.attr("what", "kv")) == (1, 0, "kv") and keep >= 0, "a part of a flush")
    readable(state)
    forms = dict(OLDER_K=form(state.main[0].k), OLDER_V=form(state.main[0].v))
    group = group_of(forms["OLDER_K"])
    need(block % group == 0, f"blocks of {block} rows")
    sizes = {n: v for n, v in fixed_sizes(state).items() if n in ("H", "D", "DV", "DP", "DVP")} | dict(BLOCK=block)
    given: dict[str, Arg | None] = {"start": axis(0, "start"), "length": cache(name, state, "len_k"), "keep": integer(keep)}
    tail: dict[str, Arg | None] = {"k": cache(name, state, "k"), "v": cache(name, state, "v"), "blocks": size(name, "blocks")}
    grid = (("slots", name, group), ("rows", state.heads))
    to.launch("flush", grid, given | tail | older(name, state), sizes | forms, reads=[name], writes=[name])
    to.launch("move_up", (("rows", state.heads),), given | tail, sizes, reads=[name], writes=[name])
    others = {"other": "len_v", "older": "older_len_k", "older_other": "older_len_v"}
    lengths = {n: cache(name, state, array) for n, array in others.items()}
    to.launch("flushed", (("rows", 1, 32),), given | lengths | {"rows": ROWS}, dict(BLOCK=block, BN=32), writes=[name], warps=1)
