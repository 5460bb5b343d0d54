"""Kernels on a cache: append, commit, advance. The memory is that of `elision.ir.layout`."""

from __future__ import annotations

from elision.codegen.cpu import grouped
from elision.codegen.cpu.cache_rows import Form, encode, row_bytes, scaled, unit
from elision.codegen.cpu.emit import Fn, Val, lanes
from elision.codegen.cpu.grouped import Grouped
from elision.codegen.cpu.kernel import Axis, Kernel, State
from elision.ir.layout import LANES

Forms = tuple[Form, Form]  # of keys and of values


def append(name: str, heads: int, dim: int, vdim: int, forms: Forms, drafted: bool, lists: int, older: bool) -> Kernel:
    """`append`: committed tokens after the entries of their sequence, drafted ones to Scratch at their node. ``lists``: of
    entries for a sequence, one for all heads or one for each. ``older``: there is a segment before the one appended to."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, k, v, state = kernel.axis(), kernel.view("k"), kernel.view("v"), kernel.state("S")
    prefix = "draft_" if drafted else ""
    blocks = state.number(f"{prefix}blocks")
    keys, values = state.address(f"{prefix}k"), state.address(f"{prefix}v")
    scales = [state.address(f"{prefix}{what}_scale") if scaled(form) else None for what, form in zip("kv", forms, strict=True)]
    rows, widths = axis.array("row"), [_width(form, n) for form, n in zip(forms, (dim, vdim), strict=True)]
    with kernel.tokens(axis) as t:
        row, place = fn.load(rows, "i64", t), fn.load(axis.array("pos"), "i64", t)
        if drafted:
            slot = fn.load(axis.array("node"), "i64", t)
            at = row * state.number("nodes") + slot
            fn.store(fn.i32(place), state.address("node_pos"), at)
            fn.store(fn.const(1, "i8"), state.address("node_live"), at)
        else:
            after = t - fn.load(axis.array("start"), "i64", row)
            with fn.loop(0, lists) as each:
                line = row * lists + each.index
                slot = fn.load(state.address("len_k"), "i64", line) + after + _before(state, line, older)
                fn.store(fn.i32(place), state.address("pos"), line * state.number("entries") + slot)
            slot = fn.load(state.address("len_k"), "i64", row * lists) + after
        with fn.loop(0, heads) as loop:
            if lists > 1 and not drafted:
                slot = fn.load(state.address("len_k"), "i64", row * lists + loop.index) + after
            block, lane = slot // LANES, slot % LANES
            first = (row * heads + loop.index) * blocks + block

            def key(c: Val | int, codes: Val, first: Val = first, lane: Val = lane) -> None:
                at = (first * widths[0] + c) * LANES + lane
                for i in range(lanes(codes.type)):
                    fn.store(fn.extract(codes, i) if codes.type.startswith("vector") else codes, keys, at + i * LANES)

            def value(c: Val | int, codes: Val, first: Val = first, lane: Val = lane) -> None:
                fn.store(codes, values, (first * LANES + lane) * widths[1] + c, unit(forms[1]))

            for what, form, source, n, put, base in zip("kv", forms, (k, v), (dim, vdim), (key, value), scales, strict=True):
                place = source.place(t, loop.index)
                if not isinstance(form, Grouped):
                    scale = encode(fn, place, n, form, put)
                    if scale is not None and base is not None:
                        fn.store(scale, base, first * LANES + lane)
                    continue
                at = (first * LANES + lane) * form.groups(n)

                def beside(name: str, group: Val, x: Val, what: str = what, at: Val = at) -> None:
                    fn.store(x, state.address(f"{prefix}{what}_{name}"), at + group)

                grouped.encode(fn, place, n, form, put, beside)
    return kernel


def _width(form: Form, dim: int) -> int:
    """Codes, or bytes of several codes, of a row."""
    return row_bytes(form, dim) if isinstance(form, Grouped) else dim


def _before(state: State, line: Val, older: bool) -> Val | int:
    """Entries of a list in the segment before."""
    return line.fn.load(state.address("older_len_k"), "i64", line) if older else 0


def commit(name: str, heads: int, dim: int, vdim: int, forms: Forms, lists: int, older: bool, some: bool) -> Kernel:
    """The accepted nodes join the cache: codes move unchanged. The axis is that of the accepted tokens; threads share heads.
    ``some``: nodes may have passed the cache by, and do not join."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, state = kernel.axis(), kernel.state("S")
    low, high = kernel.part(fn.const(heads, "i64"))
    planes = [(state.address(f"draft_{what}"), state.address(what), unit(form)) for what, form in zip("kv", forms, strict=True)]
    beside = []  # arrays of Scratch and of the segment, and their items per row
    for what, form, n in zip("kv", forms, (dim, vdim), strict=True):
        names, count = (form.beside, form.groups(n)) if isinstance(form, Grouped) else (("scale",) * scaled(form), 1)
        beside += [(state.address(f"draft_{what}_{x}"), state.address(f"{what}_{x}"), count) for x in names]
    k_width, v_width = _width(forms[0], dim), _width(forms[1], vdim)
    with fn.loop(0, axis.count) as loop:
        t = loop.index
        row, node = fn.load(axis.array("row"), "i64", t), fn.load(axis.array("node"), "i64", t)
        first = fn.load(axis.array("start"), "i64", row)
        after = _joined(fn, axis, state, row, first, t) if some else t - first
        place = fn.load(state.address("node_pos"), "i32", row * state.number("nodes") + node)
        end = high if not some else fn.select(fn.compare(_live(fn, state, row, node), "ne", 0), high, low)
        with fn.loop(low, end) as heads_loop:
            head = row * heads + heads_loop.index
            line = head if lists > 1 else row
            slot = fn.load(state.address("len_k"), "i64", line) + after
            fn.store(place, state.address("pos"), line * state.number("entries") + slot + _before(state, line, older))
            source = head * state.number("draft_blocks") + node // LANES
            target = head * state.number("blocks") + slot // LANES
            with fn.loop(0, k_width) as d:
                code = fn.load(planes[0][0], planes[0][2], (source * k_width + d.index) * LANES + node % LANES)
                fn.store(code, planes[0][1], (target * k_width + d.index) * LANES + slot % LANES)
            with fn.loop(0, v_width) as d:
                code = fn.load(planes[1][0], planes[1][2], (source * LANES + node % LANES) * v_width + d.index)
                fn.store(code, planes[1][1], (target * LANES + slot % LANES) * v_width + d.index)
            for drafted, kept, count in beside:
                with fn.loop(0, count) as d:
                    x = fn.load(drafted, "f32", (source * LANES + node % LANES) * count + d.index)
                    fn.store(x, kept, (target * LANES + slot % LANES) * count + d.index)
    return kernel


def _live(fn: Fn, state: State, row: Val, node: Val) -> Val:
    """1 for a node that is in Scratch, else 0."""
    found = fn.load(state.address("node_live"), "i8", row * state.number("nodes") + node)
    return fn.cast(found, "arith.extui", "i64")


def _joined(fn: Fn, axis: Axis, state: State, row: Val, first: Val, end: Val) -> Val:
    """How many of the accepted tokens ``first`` to ``end`` of a row are in Scratch."""
    with fn.loop(first, end, 1, [fn.const(0, "i64")]) as loop:
        loop.give(loop.carried[0] + _live(fn, state, row, fn.load(axis.array("node"), "i64", loop.index)))
    return loop.results[0]


def advance(name: str, lists: int, some: bool) -> Kernel:
    """Count the tokens of the axis into the lengths of their sequences and clear Scratch; the last thread does it. ``some``: only
    those that are in Scratch."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, state = kernel.axis(), kernel.state("S")
    starts = axis.array("start")
    low, high = kernel.share(state.number("sequences"))
    with fn.loop(low, high) as loop:
        row = loop.index
        first, end = fn.load(starts, "i64", row), fn.load(starts, "i64", row + 1)
        count = _joined(fn, axis, state, row, first, end) if some else end - first
        with fn.loop(0, lists) as each:
            line = row * lists + each.index
            for length in ("len_k", "len_v"):
                base = state.address(length)
                fn.store(fn.load(base, "i64", line) + count, base, line)
        with fn.loop(0, state.number("nodes")) as nodes:
            fn.store(fn.const(0, "i8"), state.address("node_live"), row * state.number("nodes") + nodes.index)
    return kernel
