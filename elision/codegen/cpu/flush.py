"""Ticks of the clock that move whole blocks from the tail of every cache to the segment before, in its encoding (`flush`).

Threads share the heads; a head's block lies in floats, vector by vector, while it is encoded: keys as channels of all its rows,
values as rows of all channels. Lengths change once all threads are done.
"""

from __future__ import annotations

from dataclasses import dataclass

from elision.codegen.cpu import grouped, repair
from elision.codegen.cpu.attention_rules import forms, lists_of, older
from elision.codegen.cpu.cache_rows import Form, load, row_bytes, scaled
from elision.codegen.cpu.emit import Fn, Val, vector
from elision.codegen.cpu.grouped import Grouped
from elision.codegen.cpu.kernel import Kernel, State
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.mended import Mended
from elision.codegen.refusal import NotNative
from elision.ir import schedule as abi
from elision.ir.layout import LANES
from elision.ir.program import Tick
from elision.ir.states import KV
from elision.ir.value import Graph, Value


@dataclass(frozen=True)
class Move:
    """What is fixed in the code: the cache, in which form a row is in its tail and then, how many rows move together."""

    heads: int
    dims: tuple[int, int]  # of keys and of values
    tail: tuple[Form, Form]
    forms: tuple[Form, Form]
    block: int

    @property
    def floats(self) -> int:
        """Floats of a block of keys or of values."""
        return self.block * max(self.dims)


def tick(kernels: Kernels, of: Tick) -> abi.Schedule | None:
    """The schedule of a tick, axis 0 being the sequences that are due; None if it does anything but flush the tail of every cache
    to a segment that kernels read."""
    found = _flushes(of.graph)
    rows, counts, words = [], [], 0
    for state, n, keep in found:
        type = state.type
        assert isinstance(type, KV)
        try:
            tail, before = forms(type), older(type)
        except NotNative:
            return None
        if before is None or lists_of(type) > 1 or not all(isinstance(f, str) and not scaled(f) for f in tail):
            return None
        if n % LANES or any(n % _rows(form) for form in before):
            return None
        move = Move(type.heads, (type.dim, type.vdim), tail, before, n)
        words = max(words, move.floats + repair.floats(move.block, move.dims, before))
        where, free = ("state", of.graph.names[state]), ("tensor", 1, 0, 4)
        name = kernels.add(("flush", move), lambda name, move=move: flush(name, move))  # type: ignore[misc]
        rows.append(abi.Row(name, (("axis", 0), where, ("int", keep), free)))
        name = kernels.add(("flushed", n), lambda name, n=n: flushed(name, n))  # type: ignore[misc]
        counts.append(abi.Row(name, (("axis", 0), where, ("int", keep), ("int", abi.LAST))))
    if not rows:
        return None
    rows[-1] = abi.Row(rows[-1].kernel, rows[-1].operands, True)
    buffers = [abi.Buffer(0, 0, False, -1), abi.Buffer(-1, -(-words * 4 // 64) * 64, True, 0)]
    states = [of.graph.names[state] for state, _, _ in found]
    return abi.Schedule(of.graph.name, ["rows"], buffers, [*rows, *counts], [0], [], states)


def _flushes(graph: Graph) -> list[tuple[Value, int, int]]:
    """The caches of a tick that does nothing but flush each, with the rows of a block and those that stay; else nothing."""
    found = []
    for value in graph.outputs:
        whole = value.op == "flush" and value.args[0].op == value.args[1].op == "input" and value.attr("keep", -1) >= 0
        if not whole or (value.attr("frm"), value.attr("to"), value.attr("what", "kv")) != (1, 0, "kv"):
            return []
        found.append((value.args[0], value.attr("n"), value.attr("keep")))
    return found


def _rows(form: Form) -> int:
    """Rows that are encoded together."""
    if isinstance(form, Mended):
        return form.block
    return form.group if isinstance(form, Grouped) and form.by_token else 1


def _count(length: Val, keep: Val, block: int) -> Val:
    """Blocks that move."""
    return length.fn.maximum(length - keep, 0) // block


def flush(name: str, move: Move) -> Kernel:
    """Blocks beyond the last ``keep`` rows of a tail are encoded where the segment before ends, and what stays moves up."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, state, keep = kernel.axis(), kernel.state("S"), kernel.integer("keep")
    x = kernel.tensor("free").base
    more = fn.at(x, move.floats, "f32")
    low, high = kernel.part(axis.count * move.heads)
    with fn.loop(low, high) as pairs:
        row = fn.load(axis.array("row"), "i64", pairs.index // move.heads)
        head = row * move.heads + pairs.index % move.heads
        length, done = (fn.load(state.address(what), "i64", row) for what in ("len_k", "older_len_k"))
        count = _count(length, keep, move.block)
        tails = [
            fn.at(state.address(what), head * state.number("blocks") * (LANES * row_bytes(form, dim)))
            for what, form, dim in zip("kv", move.tail, move.dims, strict=True)
        ]
        with fn.loop(0, count) as blocks:
            for what, tail, dim, form, to in zip("kv", tails, move.dims, move.tail, move.forms, strict=True):
                assert isinstance(form, str)
                _read(fn, what, tail, x, blocks.index, move.block, dim, form)
                _encode(fn, state, what, head, done // move.block + blocks.index, move.block, dim, to, x, more)
        first, size = count * (move.block // LANES), (length + (LANES - 1)) // LANES
        for tail, form, dim in zip(tails, move.tail, move.dims, strict=True):
            _move_up(fn, tail, first, size, LANES * row_bytes(form, dim))
    return kernel


def flushed(name: str, block: int) -> Kernel:
    """Count what has been moved; the last thread does it."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, state, keep = kernel.axis(), kernel.state("S"), kernel.integer("keep")
    low, high = kernel.share(axis.count)
    with fn.loop(low, high) as loop:
        row = fn.load(axis.array("row"), "i64", loop.index)
        moved = _count(fn.load(state.address("len_k"), "i64", row), keep, block) * block
        for what in "kv":
            for prefix, change in (("", -moved), ("older_", moved)):
                base = state.address(f"{prefix}len_{what}")
                fn.store(fn.load(base, "i64", row) + change, base, row)
    return kernel


def _read(fn: Fn, what: str, tail: Val, x: Val, block: Val, size: int, dim: int, form: str) -> None:
    """A block of the tail as floats: keys ``[dim][rows]``, values ``[rows][dim]``."""
    if what == "v":
        with fn.loop(0, size * dim, LANES // 2) as loop:
            fn.store(load(fn, tail, block * (size * dim) + loop.index, form, LANES // 2), x, loop.index, "f32")
        return
    with fn.loop(0, dim) as channels, fn.loop(0, size // LANES) as parts:
        at = (block * (size // LANES) + parts.index) * dim + channels.index
        fn.store(load(fn, tail, at * LANES, form, LANES), x, channels.index * size + parts.index * LANES, "f32")


def _encode(
    fn: Fn, state: State, what: str, head: Val, block: Val, size: int, dim: int, form: Form, x: Val, more: Val
) -> None:  # fmt: skip
    """The floats ``x`` as block number ``block`` of the older segment."""
    slots = state.number("older_blocks") * LANES
    mended = form if isinstance(form, Mended) else None
    codes_form = form.codes if isinstance(form, Mended) else form
    assert isinstance(codes_form, Grouped)
    arrays: dict[str, Val] = {}
    for name in form.beside if not isinstance(form, str) else ():
        at, kind = form.place(name, dim, head * slots, head * state.number("older_k_groups"))  # type: ignore[union-attr]
        arrays[name] = fn.at(state.address(f"older_{what}_{name}"), at, kind)
    codes = fn.at(state.address(f"older_{what}"), head * slots * codes_form.width(dim))
    if mended is not None:
        repair.take_out(fn, mended, dim, size, block, arrays, x)
    if codes_form.by_token:
        _keys(fn, codes_form, dim, size, block, codes, arrays, x, left=mended is not None)
    else:
        with fn.loop(0, size) as rows:
            row, source = block * size + rows.index, fn.at(x, rows.index * dim, "f32")

            def put(index: Val, byte: Val, row: Val = row) -> None:
                fn.store(byte, codes, row * codes_form.width(dim) + index)

            def beside(name: str, group: Val, number: Val, row: Val = row) -> None:
                fn.store(number, arrays[name], row * codes_form.groups(dim) + group)

            grouped.encode(fn, source, dim, codes_form, put, beside, source if mended is not None else None)
    if mended is not None and mended.rank:
        repair.low_rank(fn, mended, dim, size, block, arrays, x, more)


def _keys(
    fn: Fn, form: Grouped, dim: int, size: int, block: Val, codes: Val, arrays: dict[str, Val], x: Val, left: bool
) -> None:  # fmt: skip
    """Codes of channels ``x [dim][rows]`` in groups of rows; with ``left``, what they leave takes the place of the floats."""
    with fn.loop(0, size // form.group) as groups, fn.loop(0, dim, form.per) as loop:
        sources, spans = [], []
        for i in range(form.per):
            channel = loop.index + i
            sources.append(fn.at(x, channel * size + groups.index * form.group, "f32"))
            spans.append(grouped.span(fn, sources[-1], 0, form))
            at = (block * (size // form.group) + groups.index) * dim + channel
            grouped.store_sides(spans[-1], lambda name, number, at=at: fn.store(number, arrays[name], at))  # type: ignore[misc]
        with fn.loop(0, form.group, LANES) as rows:
            found = []
            for source, by in zip(sources, spans, strict=True):
                number = fn.load(source, vector("f32", LANES), rows.index, "f32")
                code, said = grouped.code(fn, number, by, form)
                found.append(code)
                if left:
                    fn.store(number - said, source, rows.index, "f32")
            row = block * size + groups.index * form.group + rows.index
            at = ((row // LANES) * (dim // form.per) + loop.index // form.per) * LANES
            fn.store(grouped.packed(fn, found, form), codes, at, "i8")


def _move_up(fn: Fn, tail: Val, first: Val, end: Val, bytes_: int) -> None:
    """Blocks ``first .. end - 1`` of 16 rows to the beginning, in this order: every byte is read before it is written."""
    step = next(n for n in (64, 32, 16) if bytes_ % n == 0)
    with fn.loop(0, fn.maximum(end - first, 0) * bytes_, step) as loop:
        there = fn.load(tail, vector("i8", step), first * bytes_ + loop.index, "i8")
        fn.store(there, tail, loop.index, "i8")
