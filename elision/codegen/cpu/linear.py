"""Linear layers over packed weights: ``y = f(x W1, x W2, .., extra)`` for a few or for many tokens.

A panel is 16 outputs (`elision.ir.packing`). Few registers decide the shape: 6 tokens by 16 outputs are 12 accumulators, two
weight vectors and one broadcast. Panels are shared among threads, so a thread reads its weights once, as one stream, for all
tokens. Encoded weights are decoded in registers for one token; for more, a panel is decoded once into memory that stays in the
cache. """

from __future__ import annotations

from collections.abc import Sequence

from elision.codegen.cpu.decode import PLAIN, VP, Decoder, plain
from elision.codegen.cpu.emit import LANES, PTR, VF, Fn, Val, vector
from elision.codegen.cpu.expression import evaluate
from elision.codegen.cpu.kernel import Kernel, Rows
from elision.ir.packing import PANEL, panel_bytes

VECTORS = PANEL // LANES  # vectors of a panel
TILES = (6, 4, 2, 1)  # tokens of a register tile
SUMS = 4  # independent sums of a decoding product


def scratch_bytes(formats: Sequence[str], k: int) -> int:
    """Bytes of a thread's decoded panels."""
    return sum(4 * PANEL * k for f in formats if f not in PLAIN)


def dot(
    fn: Fn, format: str, panel: Val, x: Rows, token: Val, tile: int, k: int, *, stream: bool = True
) -> list[list[Val]]:
    """Products of ``tile`` tokens from ``token`` on with one panel of plain numbers: ``[tile][VECTORS]``. ``stream``: other
    panels follow it in memory."""
    unroll = {1: 4, 2: 2}.get(tile, 2)
    sets = 4 if tile == 1 else 2 if tile == 2 else 1  # independent sums hide the latency of few accumulators
    points = [x.token(token + t) for t in range(tile)]
    zero = fn.const(0.0, VF)
    whole = k // unroll * unroll

    def rows(at: Val | int, step: int, sums: list[Val]) -> list[Val]:
        base = fn.at(panel, at * PANEL, PLAIN[format])
        weights = [[plain(fn, format, base, VF, (s * VECTORS + v) * LANES) for v in range(VECTORS)] for s in range(step)]
        if stream and tile > 1 and isinstance(at, Val):  # the next panel comes while this one is multiplied
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


def decoding_dot(fn: Fn, decoder: Decoder, panel: Val, x: Val, totals: Val | None) -> list[Val]:
    """The product of the inputs at ``x`` with a panel of encoded weights, ``[VECTORS]``; ``totals``: their `input_sums`."""
    with fn.loop(0, decoder.steps, 1, [fn.const(0.0, VP)]) as loop:
        found, point = decoder.at(panel, loop.index), fn.at(x, loop.index * decoder.size, "f32")
        sums: list[Val] = []
        for i, code in enumerate(found.codes):
            value = fn.splat(fn.load(point, "f32", i), PANEL)
            if i < SUMS:
                sums.append(code * value)
            else:
                sums[i % SUMS] = fn.fma(code, value, sums[i % SUMS])
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        total, shift = fn.fma(sums[0], found.scale, loop.carried[0]), found.shift()
        if shift is not None:
            assert totals is not None
            total = fn.fma(shift, fn.splat(fn.load(totals, "f32", loop.index), PANEL), total)
        loop.give(total)
    both = loop.results[0]
    where = [f"offsets = [{v * LANES}], sizes = [{LANES}], strides = [1]" for v in range(VECTORS)]
    return [fn.emit(f"vector.extract_strided_slice {both.name} {{{w}}} : {VP} to {VF}", VF) for w in where]


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


def linear(name: str, formats: Sequence[str], k: int, expr: str, extras: Sequence[str]) -> Kernel:
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

    totals: dict[int, Val] = {}
    for size in {d.size for d in decoders if d is not None and d.shifted}:
        totals[size] = fn.emit(f"llvm.alloca {fn.const(k // size, 'i64').name} x f32 : (i64) -> {PTR}", PTR)
        with fn.when(fn.compare(n, "eq", 1)):
            input_sums(fn, x.base, size, k // size, totals[size])

    with fn.loop(low, high) as panels:
        columns = panels.index * PANEL
        here = [fn.at(w, panels.index * panel_bytes(f"panel:{f}", k)) for w, f in zip(weights, formats, strict=True)]

        def finish(found: list[list[Val]], token: Val | int) -> None:
            """The result of a token from its products ``[weights][VECTORS]``."""
            place = out.token(fn.value(token, "i64"))
            for v in range(VECTORS):
                at = columns + v * LANES
                values = [f[v] for f in found]
                for kind, extra in zip(extras, more, strict=True):
                    base = extra.token(fn.value(token, "i64")) if kind == "tokens" else extra.base
                    values.append(fn.load(base, VF, at, "f32"))
                fn.store(evaluate(fn, expr, values), place, at, "f32")

        def tiles(places: list[Val], formats: Sequence[str]) -> None:
            done: Val | int = 0
            for tile in TILES:
                end = n - (n - done) % tile if tile > 1 else n
                with fn.loop(done, end, tile) as loop:
                    found = [
                        dot(fn, f, w, x, loop.index, tile, k, stream=d is None)
                        for f, w, d in zip(formats, places, decoders, strict=True)
                    ]
                    for t in range(tile):
                        finish([f[t] for f in found], loop.index + t)
                done = end

        if scratch is None:
            tiles(here, formats)
        else:
            with fn.when(fn.compare(n, "eq", 1)):
                found = []
                for d, f, w in zip(decoders, formats, here, strict=True):
                    if d is None:
                        found.append(dot(fn, f, w, x, fn.const(0, "i64"), 1, k)[0])
                    else:
                        found.append(decoding_dot(fn, d, w, x.base, totals.get(d.size)))
                finish(found, 0)
            with fn.when(fn.compare(n, "sgt", 1)):
                places, offset = [], 0
                for d, w in zip(decoders, here, strict=True):
                    if d is None:
                        places.append(w)
                        continue
                    places.append(fn.at(scratch, offset * PANEL * k, "f32"))
                    decode_panel(fn, d, w, places[-1])
                    offset += 1
                tiles(places, [f if d is None else "f32" for f, d in zip(formats, decoders, strict=True)])
    return kernel
