"""Linear layers over packed weights: ``y = f(x W1, x W2, .., extra)`` for a few or for many tokens.

A panel is 16 outputs (`elision.ir.packing`). Few registers decide the shape: 6 tokens by 16 outputs are 12 accumulators, two
weight vectors and one broadcast. Panels are shared among threads, so a thread reads its weights once, as one stream, for all
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elision.codegen.cpu.emit import LANES, PTR, VF, Fn, Val
from elision.codegen.cpu.expression import evaluate
from elision.codegen.cpu.kernel import Kernel, Rows
from elision.ir.packing import PANEL, panel_bytes

VECTORS = PANEL // LANES  # vectors of a panel
TILES = (6, 4, 2, 1)  # tokens of a register tile
Epilogue = Callable[[Fn, Val, Val, list[list[Val]]], list[Val]]


def weight_vectors(fn: Fn, format: str, panel: Val, k: Val | int, step: int) -> list[list[Val]]:
    """``step`` rows of a panel from input ``k`` on, as float32: ``[step][VECTORS]``."""
    if format == "f32":
        base = fn.at(panel, k * PANEL if isinstance(k, int) else k * PANEL, "f32")
        return [[fn.load(base, VF, (s * VECTORS + v) * LANES) for v in range(VECTORS)] for s in range(step)]
    base = fn.at(panel, k * PANEL, "i16")
    rows = []
    for s in range(step):
        vectors = []
        for v in range(VECTORS):
            half = fn.load(base, f"vector<{LANES}x{'i16' if format == 'bf16' else 'f16'}>", (s * VECTORS + v) * LANES)
            if format == "bf16":
                wide = fn.cast(half, "arith.extui", f"vector<{LANES}xi32>") << 16
                vectors.append(fn.cast(wide, "arith.bitcast", VF))
            else:
                vectors.append(fn.cast(half, "arith.extf", VF))
        rows.append(vectors)
    return rows


def dot(fn: Fn, format: str, panel: Val, x: Rows, token: Val, tile: int, k: int) -> list[list[Val]]:
    """Products of ``tile`` tokens from ``token`` on with one panel: ``[tile][VECTORS]``."""
    unroll = {1: 4, 2: 2}.get(tile, 2)
    sets = 4 if tile == 1 else 2 if tile == 2 else 1  # independent sums hide the latency of few accumulators
    points = [x.token(token + t) for t in range(tile)]
    zero = fn.const(0.0, VF)
    whole = k // unroll * unroll

    def rows(at: Val | int, step: int, sums: list[Val]) -> list[Val]:
        weights = weight_vectors(fn, format, panel, at, step)
        if tile > 1 and isinstance(at, Val):  # the next panel comes while this one is multiplied
            size = panel_bytes(f"panel:{format}", 1)
            for line in range(0, step * size, 64):
                fn.prefetch(fn.at(panel, at * size + (k * size + line)))
        sums = list(sums)
        for s in range(step):
            for t in range(tile):
                value = fn.splat(fn.load(points[t], "f32", at + s))
                for v in range(VECTORS):
                    i = ((s % sets) * tile + t) * VECTORS + v
                    sums[i] = fn.fma(weights[s][v], value, sums[i])
        return sums

    with fn.loop(0, whole, unroll, [zero] * (sets * tile * VECTORS)) as loop:
        loop.give(*rows(loop.index, unroll, loop.carried))
    sums = loop.results
    if k > whole:
        sums = rows(whole, k - whole, sums)
    size = tile * VECTORS
    while len(sums) > size:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    return [sums[t * VECTORS : (t + 1) * VECTORS] for t in range(tile)]


def linear(name: str, formats: Sequence[str], k: int, expr: str, extras: Sequence[str]) -> Kernel:
    """The kernel of a region: linears of one x with weights in ``formats``, then ``expr`` over their results and the ``extras``
    (``tokens``: a value per token and output; ``row``: one value per output)."""
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
            found = [dot(fn, f, w, x, token, tile, k) for f, w in zip(formats, here, strict=True)]
            for t in range(tile):
                place = out.token(token + t)
                for v in range(VECTORS):
                    at = columns + v * LANES
                    values = [f[t][v] for f in found]
                    for kind, extra in zip(extras, more, strict=True):
                        base = extra.token(token + t) if kind == "tokens" else extra.base
                        values.append(fn.load(base, VF, at, "f32"))
                    fn.store(evaluate(fn, expr, values), place, at, "f32")

        done: Val | int = 0
        for tile in TILES:
            end = n - (n - done) % tile if tile > 1 else n
            with fn.loop(done, end, tile) as loop:
                tile_of(loop.index, tile)
            done = end
    return kernel


__all__ = ["PTR", "linear"]
