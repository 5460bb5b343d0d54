"""Attention over a cache: flash attention (Dao et al. 2022) with the positions of a sequence split among threads, or the queries.

Eight entries are the lanes of one vector when scores are computed, channels are when values are summed. A thread leaves,
for every query and head, the sum of values, the largest score and the sum of weights; `combine` joins those of all threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.cache import BYTES, unit
from elision.codegen.cpu.emit import LANES, PTR, VF, VI, Fn, Val, vector
from elision.codegen.cpu.kernel import Kernel
from elision.codegen.cpu.rows import channels
from elision.ir.schedule import SEQUENCES

CHUNK = 16  # blocks of 8 entries that are scored before their values are summed
TILE = 4  # queries that share one pass over the entries
PAD = 8  # floats after a partial sum: the largest score, the sum of weights
QUERY, LOW, HIGH, BITS, SLOPE, POS, SUM, TILE_WORDS = 0, 1, 2, 3, 4, 5, 6, 8  # words of a query in a tile
HIDDEN = -1e30
_FAR = 1 << 30


@dataclass(frozen=True)
class Site:
    """What is fixed in the code of an attention site."""

    heads: int  # of the cache
    group: int  # query heads of each
    dim: int
    vdim: int
    dtypes: tuple[str, str]
    drafted: bool
    ordered: bool  # entry i holds position i
    softcap: float = 0.0
    slopes: bool = False
    sinks: bool = False

    @property
    def queries(self) -> int:
        return self.heads * self.group


def _row_vectors(fn: Fn, base: Val, index: Val | int, dtype: str) -> Val:
    """Eight stored values as float32."""
    if dtype == "f32":
        return fn.load(base, VF, index, "f32")
    codes = fn.load(base, vector(unit(dtype)), index, unit(dtype))
    if dtype == "f16":
        return fn.cast(codes, "arith.extf", VF)
    return fn.cast(fn.cast(codes, "arith.extui", VI) << 16, "arith.bitcast", VF)


def flash(name: str, site: Site, tile: int) -> Fn:
    """``flash(tile, scores, k, v, pos, first, last, limit, sinks, scale)``: entries of blocks ``first .. last - 1``, at most
    `CHUNK`, added to the partial sums of ``tile`` queries. ``limit``: entries that there are; ``sinks``: positions always in
    sight."""
    args = [("tile", PTR), ("scores", PTR), ("k", PTR), ("v", PTR), ("pos", PTR)]
    fn = Fn(name, [*args, ("first", "i64"), ("last", "i64"), ("limit", "i64"), ("sinks", "i64"), ("scale", "f32")])
    words, scores, keys, values, positions, first, last, limit, sinks, scale = fn.args
    dim, vdim = site.dim, site.vdim

    def word(j: int, i: int, type: str = "i64") -> Val:
        return fn.load(words, type, j * TILE_WORDS + i, "i64")

    queries = [word(j, QUERY, PTR) for j in range(tile)]
    low = [fn.splat(fn.i32(word(j, LOW))) for j in range(tile)]
    high = [fn.splat(fn.i32(word(j, HIGH))) for j in range(tile)]
    sinks_v, wide_scale = fn.splat(fn.i32(sinks)), fn.splat(scale)
    stop = fn.emit(f"arith.minsi {limit.name}, {(last * LANES).name} : i64", "i64")
    iota, hidden = fn.const(list(range(LANES)), VI), fn.const(HIDDEN, VF)
    lane_bits, stop_v = fn.const([1 << i for i in range(LANES)], VI), fn.splat(fn.i32(stop))
    zero = fn.const(0.0, VF)
    width = CHUNK * LANES

    with fn.loop(first, last, 2, [hidden] * tile) as loop:
        pair = [loop.index, fn.emit(f"arith.minsi {(loop.index + 1).name}, {(last - 1).name} : i64", "i64")]
        bases = [fn.at(keys, block * (dim * LANES), unit(site.dtypes[0])) for block in pair]
        step = next(s for s in (4, 2, 1) if dim % s == 0)
        with fn.loop(0, dim, step, [zero] * (2 * tile)) as inner:
            sums = list(inner.carried)
            for s in range(step):
                k = [_row_vectors(fn, base, (inner.index + s) * LANES, site.dtypes[0]) for base in bases]
                for j in range(tile):
                    q = fn.splat(fn.load(queries[j], "f32", inner.index + s))
                    for half in range(2):
                        sums[2 * j + half] = fn.fma(k[half], q, sums[2 * j + half])
            inner.give(*sums)
        tops = list(loop.carried)
        for half in range(2):
            entry = fn.splat(fn.i32((loop.index + half) * LANES)) + iota
            there = fn.compare(entry, "slt", stop_v)
            pos = fn.load(positions, VI, pair[half] * LANES, "i32")
            for j in range(tile):
                score = inner.results[2 * j + half] * wide_scale
                if site.softcap:
                    score = vm.tanh(fn, score * (1 / site.softcap)) * site.softcap
                if site.slopes:
                    distance = fn.cast(pos - fn.splat(fn.i32(word(j, POS))), "arith.sitofp", VF)
                    slope = fn.splat(fn.cast(fn.i32(word(j, SLOPE)), "arith.bitcast", "f32"))
                    score = fn.fma(distance, slope, score)
                seen = _both(fn, there, fn.compare(pos, "sle", high[j]))
                near = _either(fn, fn.compare(pos, "sge", low[j]), fn.compare(pos, "slt", sinks_v))
                seen = _both(fn, seen, near)
                if site.drafted:
                    bits = fn.splat(fn.i32((word(j, BITS) >> (pair[half] * LANES)) & 255))
                    bits = fn.select(fn.compare(word(j, BITS), "eq", 0), fn.const(255, VI), bits)
                    seen = _both(fn, seen, fn.compare(bits & lane_bits, "ne", 0))
                score = fn.select(seen, score, hidden)
                fn.store(score, scores, (loop.index - first + half) * LANES + j * width, "f32")
                tops[j] = fn.maximum(tops[j], score)
        loop.give(*tops)
    sums = [word(j, SUM, PTR) for j in range(tile)]
    scales = []
    for j in range(tile):
        before = fn.load(sums[j], "f32", vdim)
        top = fn.maximum(before, fn.top(loop.results[j]))
        scales.append(vm.exp(fn, before - top))
        wide_top = fn.splat(top)
        with fn.loop(0, last - first, 1, [zero]) as weights:
            at = weights.index * LANES + j * width
            scored = fn.load(scores, VF, at, "f32")
            p = fn.select(fn.compare(scored, "ogt", HIDDEN / 2), vm.exp(fn, scored - wide_top), zero)
            fn.store(p, scores, at, "f32")
            weights.give(weights.carried[0] + p)
        total = fn.load(sums[j], "f32", vdim + 1) * scales[j] + fn.sum(weights.results[0])
        fn.store(top, sums[j], vdim)
        fn.store(total, sums[j], vdim + 1)
    begin = first * LANES
    for start in range(0, vdim, 4 * LANES):
        lanes = [c for c in range(start, min(vdim, start + 4 * LANES), LANES)]
        old = [fn.load(sums[j], VF, c, "f32") * fn.splat(scales[j]) for j in range(tile) for c in lanes]
        with fn.loop(begin, stop, 1, old) as entries:
            rows = [_row_vectors(fn, values, entries.index * vdim + c, site.dtypes[1]) for c in lanes]
            found = []
            for j in range(tile):
                p = fn.splat(fn.load(scores, "f32", entries.index - begin + j * width))
                found += [fn.fma(rows[i], p, entries.carried[j * len(lanes) + i]) for i in range(len(lanes))]
            entries.give(*found)
        for j in range(tile):
            for i, c in enumerate(lanes):
                fn.store(entries.results[j * len(lanes) + i], sums[j], c, "f32")
    fn.returns()
    return fn


def _both(fn: Fn, a: Val, b: Val) -> Val:
    return fn.emit(f"arith.andi {a.name}, {b.name} : {a.type}", a.type)


def _either(fn: Fn, a: Val, b: Val) -> Val:
    return fn.emit(f"arith.ori {a.name}, {b.name} : {a.type}", a.type)


def attend(name: str, site: Site) -> tuple[Kernel, list[Fn]]:
    """The attention kernel of a site and the functions that it calls.

    ``by_queries`` 0: every thread takes part of the positions for all queries; 1: all positions for part of the queries.
    """
    helpers = {tile: flash(f"{name}_flash{tile}", site, tile) for tile in range(1, TILE + 1)}
    kernel = Kernel(name)
    fn = kernel.fn
    axis, q, state = kernel.axis(), kernel.view("q"), kernel.state("S")
    part, scores, tile_memory = kernel.tensor("part"), kernel.tensor("scores"), kernel.tensor("tile")
    by_queries, scale = kernel.integer("by_queries"), kernel.real("scale")
    window, chunk, full, sinks = (kernel.integer(n) for n in ("window", "chunk", "full", "ring_sinks"))
    slopes = kernel.weight("slopes") if site.slopes else None
    sequences = fn.load(kernel.ctx, "i64", SEQUENCES)
    starts, zero64 = axis.array("start"), fn.const(0, "i64")
    split = fn.compare(by_queries, "eq", 0)
    first_tile = fn.select(split, zero64, kernel.tid)
    tile_step = fn.select(split, fn.const(1, "i64"), kernel.threads)
    size = site.vdim + PAD

    with fn.loop(0, sequences) as rows:
        row = rows.index
        begin, end = fn.load(starts, "i64", row), fn.load(starts, "i64", row + 1)
        count = (end - begin) * site.group
        tiles = (count + (TILE - 1)) // TILE
        length = fn.load(state.address("len_k"), "i64", row)
        if not site.drafted:
            length = length + (end - begin)
        blocks = (length + (LANES - 1)) // LANES
        with fn.when(fn.compare(end, "sgt", begin)), fn.loop(0, site.heads) as heads:
            head = row * site.heads + heads.index

            def place(i: Val) -> tuple[Val, Val]:
                """The token and the query head of the i-th query of this cache head."""
                return begin + i // site.group, heads.index * site.group + i % site.group

            def partial(token: Val, query: Val) -> Val:
                return fn.at(part.token(token), query * size, "f32")

            with fn.loop(first_tile * TILE, count, tile_step * TILE) as fresh:
                end_of_tile = fn.emit(f"arith.minsi {(fresh.index + TILE).name}, {count.name} : i64", "i64")
                with fn.loop(fresh.index, end_of_tile) as each:
                    target = partial(*place(each.index))
                    _clear(fn, target, site.vdim)
                    fn.store(fn.const(HIDDEN, "f32"), target, site.vdim)
                    fn.store(fn.const(0.0, "f32"), target, site.vdim + 1)

            def visit(keys: Val, values: Val, pos: Val, low: Val, high: Val, limit: Val, drafted: bool) -> None:
                """All tiles of this thread over blocks ``low .. high - 1``, a chunk at a time."""
                with fn.loop(low, high, CHUNK) as chunks, fn.loop(first_tile, tiles, tile_step) as loop:
                    last = fn.emit(f"arith.minsi {(chunks.index + CHUNK).name}, {high.name} : i64", "i64")
                    query0 = loop.index * TILE
                    left = count - query0
                    top = fn.const(-1, "i64")
                    for j in range(TILE):
                        i = fn.emit(f"arith.minsi {(query0 + j).name}, {(count - 1).name} : i64", "i64")
                        token, query = place(i)
                        where = fn.load(axis.array("pos"), "i64", token)
                        bounds = _bounds(fn, where, window, chunk, full)
                        top = fn.maximum(top, bounds[1])
                        bits = fn.load(axis.array("anc"), "i64", token) if drafted else zero64
                        slope = fn.load(slopes, "i32", query) if slopes is not None else None
                        items = {
                            QUERY: q.place(token, query), LOW: bounds[0], HIGH: bounds[1], BITS: bits, POS: where,
                            SUM: partial(token, query),
                        }  # fmt: skip
                        for at, item in items.items():
                            fn.store(item, tile_memory.base, j * TILE_WORDS + at, "i64")
                        if slope is not None:
                            fn.store(fn.cast(slope, "arith.extui", "i64"), tile_memory.base, j * TILE_WORDS + SLOPE, "i64")
                    inside: Val | None = None
                    if site.ordered and not drafted:  # nothing after the last position that the tile sees
                        inside = fn.compare(chunks.index * LANES, "sle", top)
                    for tile in range(1, TILE + 1):
                        fits = fn.compare(left, "sge" if tile == TILE else "eq", tile)
                        with fn.when(fits if inside is None else _both(fn, fits, inside)):
                            fn.call(
                                f"{name}_flash{tile}", tile_memory.base, scores.base, keys, values, pos,
                                chunks.index, last, limit, sinks, scale,
                            )  # fmt: skip

            low, high = zero64, blocks
            if site.ordered:  # nothing before the first position that the first token sees
                seen = _bounds(fn, fn.load(axis.array("pos"), "i64", begin), window, chunk, full)[0]
                low = fn.maximum(seen, 0) // LANES
                low = fn.select(fn.compare(sinks, "sgt", 0), zero64, low)
                low = fn.emit(f"arith.minsi {low.name}, {high.name} : i64", "i64")
            a, b = kernel.part(high - low)
            mine = fn.select(split, low + a, low), fn.select(split, low + b, high)
            k_size, v_size = BYTES[site.dtypes[0]], BYTES[site.dtypes[1]]
            at = head * state.number("blocks") * LANES
            visit(
                fn.at(state.address("k"), at * (site.dim * k_size)), fn.at(state.address("v"), at * (site.vdim * v_size)),
                fn.at(state.address("pos"), row * state.number("entries"), "i32"), *mine, length, False,
            )  # fmt: skip
            if site.drafted:
                nodes = fn.load(axis.array("node"), "i64", end - 1) + 1
                idle = fn.compare(kernel.tid, "ne", kernel.threads - 1)
                idle = _both(fn, idle, split)
                high = fn.select(idle, zero64, (nodes + (LANES - 1)) // LANES)
                at = head * state.number("draft_blocks") * LANES
                visit(
                    fn.at(state.address("draft_k"), at * (site.dim * k_size)),
                    fn.at(state.address("draft_v"), at * (site.vdim * v_size)),
                    fn.at(state.address("node_pos"), row * state.number("nodes"), "i32"), zero64, high, nodes, True,
                )  # fmt: skip
    return kernel, list(helpers.values())


def _clear(fn: Fn, target: Val, size: int) -> None:
    channels(fn, size, lambda c, type: fn.store(fn.const(0.0, type), target, c, "f32"))


def _bounds(fn: Fn, where: Val, window: Val, chunk: Val, full: Val) -> tuple[Val, Val]:
    """The first and the last position in sight from ``where``."""
    far = fn.const(_FAR, "i64")
    low = fn.select(fn.compare(window, "sgt", 0), where - window + 1, fn.const(-_FAR, "i64"))
    whole = fn.maximum(chunk, 1)
    low = fn.select(fn.compare(chunk, "sgt", 0), (where // whole) * whole, low)
    return low, fn.select(fn.compare(full, "eq", 1), far, where)


def combine(name: str, site: Site) -> Kernel:
    """The partial sums of all threads as one result ``[tokens, heads, vdim]``; sinks take weight and give nothing."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, out = kernel.axis(), kernel.tensor("out")
    part, apart, stride = kernel.parts("part")
    split = kernel.integer("parts")
    sinks = kernel.weight("sinks") if site.sinks else None
    parts = fn.select(fn.compare(split, "eq", 0), kernel.threads, split)
    size = site.vdim + PAD
    with kernel.tokens(axis) as t, fn.loop(0, site.queries) as heads:
        here = fn.at(part, (t * stride + heads.index * size) * 4)
        start = fn.load(sinks, "f32", heads.index) if sinks is not None else fn.const(HIDDEN, "f32")
        with fn.loop(0, parts, 1, [start]) as loop:
            loop.give(fn.maximum(loop.carried[0], fn.load(fn.at(here, loop.index * apart), "f32", site.vdim)))
        top = loop.results[0]
        begin = vm.exp(fn, start - top) if sinks is not None else fn.const(0.0, "f32")
        with fn.loop(0, parts, 1, [begin]) as loop:
            p = fn.at(here, loop.index * apart)
            scale = vm.exp(fn, fn.load(p, "f32", site.vdim) - top)
            loop.give(loop.carried[0] + scale * fn.load(p, "f32", site.vdim + 1))
        share = 1.0 / fn.maximum(loop.results[0], 1e-30)
        target = fn.at(out.token(t), heads.index * site.vdim, "f32")
        with fn.loop(0, parts) as loop:
            p = fn.at(here, loop.index * apart)
            scale = vm.exp(fn, fn.load(p, "f32", site.vdim) - top) * share
            wide = fn.splat(scale)
            begins = fn.compare(loop.index, "eq", 0)

            def write(c: Val | int, type: str, p: Val = p, scale: Val = scale, wide: Val = wide, begins: Val = begins) -> None:
                value = fn.load(p, type, c, "f32") * (scale if type == "f32" else wide)
                before = fn.select(begins, fn.const(0.0, type), fn.load(target, type, c, "f32"))
                fn.store(value + before, target, c, "f32")

            channels(fn, site.vdim, write)
    return kernel


def supported(dim: int, vdim: int, dtypes: Sequence[str]) -> bool:
    return vdim % LANES == 0 and all(d in BYTES for d in dtypes) and dim >= 1
