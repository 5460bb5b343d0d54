"""Linear layers over packed weights: ``y = f(x W1, x W2, .., extra)`` for a few or for many tokens.

A panel is 16 outputs (`elision.ir.packing`), one vector; a register tile is some tokens by one panel. Panels are shared among
threads, so a thread reads its weights once, as one stream, for all tokens. Encoded weights are decoded in registers for a tile of
tokens; for many tokens, a panel is decoded once into memory that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elision.codegen.cpu.decode import PLAIN, VP, Decoder, plain
from elision.codegen.cpu.emit import PTR, Fn, Val, vector
from elision.codegen.cpu.expression import evaluate
from elision.codegen.cpu.kernel import Kernel, Rows
from elision.ir.packing import PANEL, panel_bytes
from elision.llvm.processor import needs

SUMS = 4  # independent sums of a decoding product of one token


@dataclass(frozen=True)
class Tiles:
    """Tokens of a register tile, largest first; of one that decodes weights; and from how many on a panel is decoded first."""

    plain: tuple[int, ...]
    decoding: int
    many: int


def tiles(level: str) -> Tiles:
    """What the registers of a feature level hold: 32 of a panel each, or 16 of half a panel."""
    return Tiles((12, 8, 4, 2, 1), 8, 32) if "avx512f" in needs(level) else Tiles((6, 4, 2, 1), 4, 16)


def scratch_bytes(formats: Sequence[str], k: int) -> int:
    """Bytes of a thread's decoded panels."""
    return sum(4 * PANEL * k for f in formats if f not in PLAIN)


def dot(fn: Fn, format: str, panel: Val, x: Rows, token: Val, tile: int, k: int, *, stream: bool = True) -> list[Val]:
    """Products of ``tile`` tokens from ``token`` on with one panel of plain numbers, a vector each. ``stream``: other panels
    follow it in memory."""
    unroll = 4 if tile == 1 else 2
    sets = 4 if tile == 1 else 2 if tile == 2 else 1  # independent sums hide the latency of few accumulators
    points = [x.token(token + t) for t in range(tile)]
    whole = k // unroll * unroll

    def rows(at: Val | int, step: int, sums: list[Val]) -> list[Val]:
        base = fn.at(panel, at * PANEL, PLAIN[format])
        weights = [plain(fn, format, base, VP, s * PANEL) for s in range(step)]
        if stream and tile > 1 and isinstance(at, Val):  # the next panel comes while this one is multiplied
            size = panel_bytes(f"panel:{format}", 1)
            for line in range(0, step * size, 64):
                fn.prefetch(fn.at(panel, at * size + (k * size + line)))
        sums = list(sums)
        for s in range(step):
            for t in range(tile):
                i = (s % sets) * tile + t
                sums[i] = fn.fma(weights[s], fn.splat(fn.load(points[t], "f32", at + s), PANEL), sums[i])
        return sums

    with fn.loop(0, whole, unroll, [fn.const(0.0, VP)] * (sets * tile)) as loop:
        loop.give(*rows(loop.index, unroll, loop.carried))
    sums = loop.results
    if k > whole:
        sums = rows(whole, k - whole, sums)
    while len(sums) > tile:
        half = len(sums) // 2
        sums = [a + b for a, b in zip(sums[:half], sums[half:], strict=True)]
    return sums


def decoding_dot(fn: Fn, decoder: Decoder, panel: Val, points: Sequence[Val], totals: Sequence[Val]) -> list[Val]:
    """Products of the tokens whose inputs are at ``points`` with a panel of encoded weights, a vector each; ``totals``: their
    `input_sums`, of weights that are shifted."""
    count = SUMS if len(points) == 1 else 1
    with fn.loop(0, decoder.steps, 1, [fn.const(0.0, VP)] * len(points)) as loop:
        found, results = decoder.at(panel, loop.index), []
        shift = found.shift()
        for t, point in enumerate(points):
            inputs, sums = fn.at(point, loop.index * decoder.size, "f32"), list[Val]()
            for i, code in enumerate(found.codes):
                value = fn.splat(fn.load(inputs, "f32", i), PANEL)
                if i < count:
                    sums.append(code * value)
                else:
                    sums[i % count] = fn.fma(code, value, sums[i % count])
            while len(sums) > 1:
                sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
            total = fn.fma(sums[0], found.scale, loop.carried[t])
            if shift is not None:
                total = fn.fma(shift, fn.splat(fn.load(totals[t], "f32", loop.index), PANEL), total)
            results.append(total)
        loop.give(*results)
    return loop.results


def input_sums(fn: Fn, x: Val, size: int, count: int, place: Val) -> None:
    """Sums of every ``size`` inputs, which minima are multiplied by."""
    lanes = min(size, PANEL)
    with fn.loop(0, count) as loop:
        point = fn.at(x, loop.index * size, "f32")
        total = fn.load(point, vector("f32", lanes), 0, "f32")
        for i in range(lanes, size, lanes):
            total = total + fn.load(point, vector("f32", lanes), i, "f32")
        fn.store(fn.sum(total), place, loop.index)


def decode_panel(fn: Fn, decoder: Decoder, panel: Val, place: Val) -> None:
    """A panel as ``f32[K][16]``."""
    with fn.loop(0, decoder.steps) as loop:
        target = fn.at(place, loop.index * (decoder.size * PANEL), "f32")
        for i, value in enumerate(decoder.at(panel, loop.index).values()):
            fn.store(value, target, i * PANEL, "f32")


def linear(name: str, formats: Sequence[str], k: int, expr: str, extras: Sequence[str], tiles: Tiles) -> Kernel:
    """The kernel of a region: linears of one x with weights in ``formats`` (f32, or an encoding), then ``expr`` over their
    results and the ``extras`` (``tokens``: a value per token and output; ``row``: one value per output)."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, out = kernel.axis(), kernel.tensor("x"), kernel.tensor("out")
    count = kernel.integer("panels")
    weights = [kernel.weight(f"w{i}") for i in range(len(formats))]
    more = [kernel.tensor(f"extra{i}") for i in range(len(extras))]
    decoders = [None if f in PLAIN else Decoder(fn, f, k) for f in formats]
    scratch = kernel.tensor("scratch").base if any(decoders) else None
    low, high = kernel.part(count)
    n = axis.count
    few = fn.compare(n, "slt", tiles.many)
    totals = _totals(fn, decoders, x, n, few, k, tiles) if scratch is not None else {}

    with fn.loop(low, high) as panels:
        columns = panels.index * PANEL
        here = [fn.at(w, panels.index * panel_bytes(f"panel:{f}", k)) for w, f in zip(weights, formats, strict=True)]

        def finish(values: list[Val], token: Val) -> None:
            """The result of a token from its products."""
            for kind, extra in zip(extras, more, strict=True):
                base = extra.token(token) if kind == "tokens" else extra.base
                values = [*values, fn.load(base, VP, columns, "f32")]
            fn.store(evaluate(fn, expr, values), out.token(token), columns, "f32")

        def tiled(places: list[Val], formats: Sequence[str]) -> None:
            done: Val | int = 0
            for tile in tiles.plain:
                end = n - (n - done) % tile if tile > 1 else n
                with fn.loop(done, end, tile) as loop:
                    found = [
                        dot(fn, f, w, x, loop.index, tile, k, stream=d is None)
                        for f, w, d in zip(formats, places, decoders, strict=True)
                    ]
                    for t in range(tile):
                        finish([f[t] for f in found], loop.index + t)
                done = end

        def decoding(first: Val, tile: int) -> None:
            """A tile of tokens; beyond the last one it does that one again."""
            tokens = [fn.minimum(first + t, n - 1) for t in range(tile)]
            points = [x.token(t) for t in tokens]
            found = []
            for d, f, w in zip(decoders, formats, here, strict=True):
                if d is None:
                    found.append([dot(fn, f, w, x, t, 1, k)[0] for t in tokens])
                else:
                    sums = [fn.at(totals[d.size], t * (k // d.size), "f32") for t in tokens] if d.shifted else []
                    found.append(decoding_dot(fn, d, w, points, sums))
            for i, t in enumerate(tokens):
                finish([f[i] for f in found], t)

        if scratch is None:
            tiled(here, formats)
        else:
            with fn.when(fn.compare(n, "eq", 1)):
                decoding(fn.const(0, "i64"), 1)
            with fn.when(fn.compare(n, "sgt", 1)):
                with fn.when(few), fn.loop(0, n, tiles.decoding) as loop:
                    decoding(loop.index, tiles.decoding)
                with fn.when(fn.compare(n, "sge", tiles.many)):
                    places = list(here)
                    for i, (d, w) in enumerate(zip(decoders, here, strict=True)):
                        if d is not None:
                            places[i] = fn.at(scratch, sum(e is not None for e in decoders[:i]) * PANEL * k, "f32")
                            decode_panel(fn, d, w, places[i])
                    tiled(places, [f if d is None else "f32" for f, d in zip(formats, decoders, strict=True)])
    return kernel


def _totals(
    fn: Fn, decoders: Sequence[Decoder | None], x: Rows, n: Val, few: Val, k: int, tiles: Tiles
) -> dict[int, Val]:
    """The sums of few tokens' inputs, by the size of the steps of weights that are shifted."""
    found: dict[int, Val] = {}
    for size in {d.size for d in decoders if d is not None and d.shifted}:
        room = fn.const((tiles.many - 1) * (k // size), "i64")
        found[size] = fn.emit(f"llvm.alloca {room.name} x f32 : (i64) -> {PTR}", PTR)
        with fn.when(few), fn.loop(0, n) as loop:
            input_sums(fn, x.token(loop.index), size, k // size, fn.at(found[size], loop.index * (k // size), "f32"))
    return found
