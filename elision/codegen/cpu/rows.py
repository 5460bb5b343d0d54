"""Kernels that look at one token at a time: embedding, gathering, norms, rotations, pointwise expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elision.codegen.cpu.decode import PLAIN, Decoder, plain
from elision.codegen.cpu.emit import LANES, VF, Fn, Val
from elision.codegen.cpu.expression import evaluate
from elision.codegen.cpu.kernel import Kernel
from elision.ir.packing import PANEL, panel_bytes


def channels(fn: Fn, size: int, body: Callable[[Val | int, str], None]) -> None:
    """``body(first channel, type)`` over ``size`` channels, eight at a time and the rest one by one."""
    whole = size // LANES * LANES
    if whole:
        with fn.loop(0, whole, LANES) as loop:
            body(loop.index, VF)
    for i in range(whole, size):
        body(i, "f32")


def _total(fn: Fn, size: int, term: Callable[[Val | int, str], Val]) -> Val:
    """The sum of ``term(channel, type)`` over all channels, a scalar."""
    whole = size // LANES * LANES
    found: Val | None = None
    if whole:
        with fn.loop(0, whole, LANES, [fn.const(0.0, VF)]) as loop:
            loop.give(loop.carried[0] + term(loop.index, VF))
        found = fn.sum(loop.results[0])
    for i in range(whole, size):
        more = term(i, "f32")
        found = more if found is None else found + more
    assert found is not None
    return found


def embed(name: str, format: str, width: int) -> Kernel:
    """Rows of a packed table at the token ids."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, ids, out, table = kernel.axis(), kernel.tensor("ids"), kernel.tensor("out"), kernel.weight("table")
    decoder = None if format in PLAIN else Decoder(fn, format, width)
    with kernel.tokens(axis) as t:
        row, place = fn.load(ids.token(t, "i64"), "i64"), out.token(t)
        panel, lane = fn.at(table, (row // PANEL) * panel_bytes(f"panel:{format}", width)), row % PANEL
        with fn.loop(0, width if decoder is None else decoder.steps) as loop:
            if decoder is None:
                fn.store(plain(fn, format, panel, "f32", loop.index * PANEL + lane), place, loop.index)
            else:
                first = loop.index * decoder.size
                for i, value in enumerate(decoder.at(panel, loop.index, lane).values()):
                    fn.store(value, place, first + i)
    return kernel


def gather(name: str, width: int) -> Kernel:
    """Tokens of the parent axis, at a child axis."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, out = kernel.axis(), kernel.tensor("x"), kernel.tensor("out")
    index = axis.array("index")
    with kernel.tokens(axis) as t:
        source, place = x.token(fn.load(index, "i64", t)), out.token(t)
        channels(fn, width, lambda c, type: fn.store(fn.load(source, type, c, "f32"), place, c, "f32"))
    return kernel


def take(name: str, width: int) -> Kernel:
    """Tokens of another axis at the indices that a value gives."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, index, out = kernel.axis(), kernel.tensor("x"), kernel.tensor("index"), kernel.tensor("out")
    with kernel.tokens(axis) as t:
        source, place = x.token(fn.load(index.token(t, "i64"), "i64")), out.token(t)
        channels(fn, width, lambda c, type: fn.store(fn.load(source, type, c, "f32"), place, c, "f32"))
    return kernel


def prepend(name: str, width: int, count: int) -> Kernel:
    """Tokens of another axis at their places, and ``count`` tokens that are the same for all sequences before them."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, first, out = kernel.axis(), kernel.tensor("x"), kernel.weight("first"), kernel.tensor("out")
    index = axis.array("index")
    with kernel.tokens(axis) as t:
        source, place = fn.load(index, "i64", t), out.token(t)
        new = fn.compare(source, "slt", 0)
        row = fn.select(new, fn.at(first, (source + count) * width, "f32"), x.token(source))
        channels(fn, width, lambda c, type: fn.store(fn.load(row, type, c, "f32"), place, c, "f32"))
    return kernel


def norm(name: str, size: int, kind: str, eps: float, offset: float, weights: int) -> Kernel:
    """`norm` over the last ``size`` channels; ``weights``: none, a scale, or a scale and a shift."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, out, outer = kernel.axis(), kernel.view("x"), kernel.view("out"), kernel.integer("outer")
    more = [(kernel.weight(f"w{i}"), kernel.integer(f"w{i}.outer")) for i in range(weights)]
    with kernel.tokens(axis) as t, fn.loop(0, outer) as heads:
        source, place = x.place(t, heads.index), out.place(t, heads.index)
        mean = _total(fn, size, lambda c, type: fn.load(source, type, c, "f32")) / float(size) if kind == "layer" else None

        def centred(c: Val | int, type: str, source: Val = source, mean: Val | None = mean) -> Val:
            value = fn.load(source, type, c, "f32")
            if mean is None:
                return value
            return value - (mean if type == "f32" else fn.splat(mean))

        def square(c: Val | int, type: str) -> Val:
            value = centred(c, type)
            return value * value

        moment = _total(fn, size, square)
        moment = moment if kind == "l2" else moment / float(size)
        scale = 1.0 / fn.math("sqrt", moment + eps)
        wide = fn.splat(scale)
        bases = [fn.at(w, heads.index * stride, "f32") for w, stride in more]

        def write(c: Val | int, type: str, place: Val = place) -> None:
            value = centred(c, type) * (scale if type == "f32" else wide)
            if bases:
                w = fn.load(bases[0], type, c, "f32")
                value = value * (w + offset if offset else w)
            if len(bases) > 1:
                value = value + fn.load(bases[1], type, c, "f32")
            fn.store(value, place, c, "f32")

        channels(fn, size, write)
    return kernel


def reduce(name: str, size: int, kind: str) -> Kernel:
    """`reduce` over the last ``size`` channels: one number for each of ``outer``."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, out, outer = kernel.axis(), kernel.view("x"), kernel.tensor("out"), kernel.integer("outer")
    with kernel.tokens(axis) as t, fn.loop(0, outer) as heads:
        source = x.place(t, heads.index)
        if kind == "max":
            with fn.loop(1, size, 1, [fn.load(source, "f32")]) as loop:
                loop.give(fn.maximum(loop.carried[0], fn.load(source, "f32", loop.index)))
            found = loop.results[0]
        else:
            found = _total(fn, size, lambda c, type: fn.load(source, type, c, "f32"))
            found = found / float(size) if kind == "mean" else found
        fn.store(found, out.token(t), heads.index)
    return kernel


def rotation(name: str, half: int) -> Kernel:
    """Cosines, then sines, of ``pos * inv_freq`` for every token: ``[tokens, 2 * half]``."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, out, freq, scale = kernel.axis(), kernel.tensor("out"), kernel.weight("inv_freq"), kernel.real("scale")
    positions = axis.array("pos")
    with kernel.tokens(axis) as t:
        place, p = out.token(t), fn.cast(fn.load(positions, "i64", t), "arith.sitofp", "f32")
        with fn.loop(0, half) as loop:
            angle = p * fn.load(freq, "f32", loop.index)
            fn.store(fn.math("cos", angle) * scale, place, loop.index)
            fn.store(fn.math("sin", angle) * scale, place, loop.index + half)
    return kernel


def rope(name: str, half: int, width: int, style: str) -> Kernel:
    """`rope` with a table of `rotation`; channels from ``2 * half`` on are copied."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, out = kernel.axis(), kernel.view("x"), kernel.view("out")
    outer, table = kernel.integer("outer"), kernel.tensor("table")
    with kernel.tokens(axis) as t, fn.loop(0, outer) as heads:
        source, place, angles = x.place(t, heads.index), out.place(t, heads.index), table.token(t)

        def turn(c: Val | int, type: str, source: Val = source, place: Val = place, angles: Val = angles) -> None:
            cos, sin = fn.load(angles, type, c, "f32"), fn.load(angles, type, c + half, "f32")
            if style == "half":
                a, b = fn.load(source, type, c, "f32"), fn.load(source, type, c + half, "f32")
            elif type == "f32":
                a, b = fn.load(source, type, c * 2, "f32"), fn.load(source, type, c * 2 + 1, "f32")
            else:
                both = fn.load(source, f"vector<{2 * LANES}xf32>", c * 2, "f32")
                a, b = _deinterleave(fn, both)
            first, second = a * cos - b * sin, b * cos + a * sin
            if style != "interleaved":
                fn.store(first, place, c, "f32")
                fn.store(second, place, c + half, "f32")
            elif type == "f32":
                fn.store(first, place, c * 2, "f32")
                fn.store(second, place, c * 2 + 1, "f32")
            else:
                wide = f"vector<{2 * LANES}xf32>"
                mixed = fn.emit(f"vector.interleave {first.name}, {second.name} : {VF} -> {wide}", wide)
                fn.store(mixed, place, c * 2, "f32")

        channels(fn, half, turn)
        for c in range(2 * half, width):
            fn.store(fn.load(source, "f32", c), place, c)
    return kernel


def _deinterleave(fn: Fn, both: Val) -> tuple[Val, Val]:
    even = ", ".join(str(2 * i) for i in range(LANES))
    odd = ", ".join(str(2 * i + 1) for i in range(LANES))
    found = [
        fn.emit(f"vector.shuffle {both.name}, {both.name} [{order}] : {both.type}, {both.type}", VF) for order in (even, odd)
    ]
    return found[0], found[1]


def pointwise(name: str, width: int, expr: str, kinds: Sequence[str]) -> Kernel:
    """`map` over ``[tokens, outer, width]``; ``kinds`` of operands: ``last`` (varies along the last axis), ``one`` (does not)."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, out, outer = kernel.axis(), kernel.view("out"), kernel.integer("outer")
    operands = [kernel.view(f"x{i}") for i in range(len(kinds))]
    with kernel.tokens(axis) as t, fn.loop(0, outer) as loop:
        places, place = [x.place(t, loop.index) for x in operands], out.place(t, loop.index)

        def write(c: Val | int, type: str, places: list[Val] = places, place: Val = place) -> None:
            values = []
            for kind, base in zip(kinds, places, strict=True):
                value = fn.load(base, type if kind == "last" else "f32", c if kind == "last" else 0, "f32")
                values.append(fn.splat(value) if value.type != type else value)
            fn.store(evaluate(fn, expr, values), place, c, "f32")

        channels(fn, width, write)
    return kernel
