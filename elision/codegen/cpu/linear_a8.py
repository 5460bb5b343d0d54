"""Linear layers of int8 activations and integer weights: ``y = f(x W1, x W2, .., extra)`` with sums of integers per group.

As in `elision.codegen.cpu.linear`, a thread reads its panels of 16 outputs as one stream; each vector of weights is used for
all tokens of a tile. """

from __future__ import annotations

from collections.abc import Sequence

from elision.codegen.cpu.codes import codes_of
from elision.codegen.cpu.emit import Fn, Val
from elision.codegen.cpu.expression import evaluate
from elision.codegen.cpu.integer_dot import Dot, Way
from elision.codegen.cpu.kernel import Kernel
from elision.codegen.cpu.quantise import Block
from elision.ir.packing import PANEL, panel_bytes
from elision.ir.weights import GROUP


def dot(fn: Fn, way: Way, format: str, panel: Val, blocks: Sequence[Block], k: int) -> list[list[Val]]:
    """Products of the tokens of these blocks with one panel: ``[tokens][vectors]``."""
    codes = codes_of(format)
    vectors, products = PANEL // way.lanes, Dot(fn, way, codes.bits)
    offset = codes.offset + products.offset
    scalars = [(b.scale(), b.scaled_sum(), b.sum()) for b in blocks]
    zero = fn.const(0.0, way.floats)
    with fn.loop(0, k // GROUP, 1, [zero] * (len(blocks) * vectors)) as loop:
        g = loop.index
        place = fn.at(panel, g * codes.group_bytes + codes.header)
        if len(blocks) > 1:  # the next panel comes while this one is multiplied
            for line in range(0, codes.group_bytes, 64):
                fn.prefetch(fn.at(place, panel_bytes(f"panel:{format}", k) + line))
        sums: list[list[Val | None]] = [[None] * vectors for _ in blocks]
        step = 32 // codes.bits  # inputs that a vector of weights holds of each output
        for first in range(0, GROUP, step):
            for v in range(vectors):
                raw = fn.load(place, way.codes, first * PANEL * codes.bits // 8 + v * 4 * way.lanes)
                for q, weights in enumerate(products.weights(raw)):
                    for t, block in enumerate(blocks):
                        x = fn.at(block.code(g * GROUP), first + 4 * q)
                        sums[t][v] = products.add(sums[t][v], weights, x)
        found: list[Val] = []
        header = fn.at(panel, g * codes.group_bytes) if codes.per_group else panel
        for t, (scale, scaled_sum, total) in enumerate(scalars):
            size = fn.splat(fn.load(scale, "f32", g), way.lanes)
            extra = fn.splat(fn.load(total, "i32", g), way.lanes) * offset if offset else None
            for v in range(vectors):
                whole = sums[t][v]
                assert whole is not None
                whole = products.total(whole)
                value = fn.cast(whole if extra is None else whole - extra, "arith.sitofp", way.floats) * size
                before = loop.carried[t * vectors + v]
                if not codes.per_group:
                    found.append(before + value)
                    continue
                after = fn.fma(value, _half(fn, way, header, v * way.lanes), before)
                if codes.minimum:
                    below = fn.splat(fn.load(scaled_sum, "f32", g), way.lanes)
                    after = fn.fma(below, _half(fn, way, header, PANEL + v * way.lanes), after)
                found.append(after)
        loop.give(*found)
    done = loop.results
    if not codes.per_group:
        done = [x * _half(fn, way, panel, i % vectors * way.lanes) for i, x in enumerate(done)]
    return [done[t * vectors : (t + 1) * vectors] for t in range(len(blocks))]


def _half(fn: Fn, way: Way, place: Val, index: int) -> Val:
    return fn.cast(fn.load(place, f"vector<{way.lanes}xf16>", index), "arith.extf", way.floats)


def linear(name: str, way: Way, formats: Sequence[str], k: int, expr: str, extras: Sequence[str]) -> Kernel:
    """The kernel of a region, as `elision.codegen.cpu.linear.linear`; ``x`` are blocks (`elision.codegen.cpu.quantise`)."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, out = kernel.axis(), kernel.tensor("x"), kernel.tensor("out")
    count = kernel.integer("panels")
    weights = [kernel.weight(f"w{i}") for i in range(len(formats))]
    more = [kernel.tensor(f"extra{i}") for i in range(len(extras))]
    low, high = kernel.part(count)
    n = axis.count
    with fn.loop(low, high) as panels:
        columns = panels.index * PANEL
        here = [fn.at(w, panels.index * panel_bytes(f"panel:{f}", k)) for w, f in zip(weights, formats, strict=True)]

        def tile_of(token: Val, tile: int) -> None:
            blocks = [Block(fn, x.token(token + t, "i8"), k) for t in range(tile)]
            found = [dot(fn, way, f, w, blocks, k) for f, w in zip(formats, here, strict=True)]
            for t in range(tile):
                place = out.token(token + t)
                for v in range(PANEL // way.lanes):
                    at = columns + v * way.lanes
                    values = [f[t][v] for f in found]
                    for kind, extra in zip(extras, more, strict=True):
                        base = extra.token(token + t) if kind == "tokens" else extra.base
                        values.append(fn.load(base, way.floats, at, "f32"))
                    fn.store(evaluate(fn, expr, values), place, at, "f32")

        done: Val | int = 0
        for tile in way.tiles:
            end = n - (n - done) % tile if tile > 1 else n
            with fn.loop(done, end, tile) as loop:
                tile_of(loop.index, tile)
            done = end
    return kernel
