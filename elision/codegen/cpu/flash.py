"""The inner part of attention: entries of a cache added to the partial sums of a few queries.

Eight entries are the lanes of one vector when scores are computed, channels are when values are summed. Codes of integers are
widened in registers: a key's scale multiplies its score, a value's scale its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.cache_rows import load, scaled, unit
from elision.codegen.cpu.emit import LANES, PTR, VF, VI, Fn, Val

CHUNK = 16  # blocks of 8 entries that are scored before their values are summed
TILE = 4  # queries that share one pass over the entries
PAD = 8  # floats after a partial sum: the largest score, the sum of weights
QUERY, LOW, HIGH, BITS, SLOPE, POS, SUM, TILE_WORDS = 0, 1, 2, 3, 4, 5, 6, 8  # words of a query in a tile
HIDDEN = -1e30


@dataclass(frozen=True)
class Site:
    """What is fixed in the code of an attention site."""

    heads: int  # of the cache
    group: int  # query heads of each
    dim: int
    vdim: int
    forms: tuple[str, str]  # of keys and of values (`elision.codegen.cpu.cache_rows`)
    drafted: bool
    ordered: bool  # entry i holds position i
    softcap: float = 0.0
    slopes: bool = False
    sinks: bool = False

    @property
    def queries(self) -> int:
        return self.heads * self.group

    @property
    def scaled(self) -> str:
        """Which of keys (``k``) and values (``v``) have scales."""
        return "".join(what for what, form in zip("kv", self.forms, strict=True) if scaled(form))


def flash(name: str, site: Site, tile: int) -> Fn:
    """``flash(tile, scores, k, v, pos, first, last, limit, sinks, scale)``: entries of blocks ``first .. last - 1``, at most
    `CHUNK`, added to the partial sums of ``tile`` queries. ``limit``: entries that there are; ``sinks``: positions always in
    sight. The scales of keys and of values follow, where they have some."""
    args = [("tile", PTR), ("scores", PTR), ("k", PTR), ("v", PTR), ("pos", PTR)]
    args += [("first", "i64"), ("last", "i64"), ("limit", "i64"), ("sinks", "i64"), ("scale", "f32")]
    fn = Fn(name, args + [(f"{what}_scale", PTR) for what in site.scaled])
    words, scores, keys, values, positions, first, last, limit, sinks, scale, *scales = fn.args
    key_scales, value_scales = (dict(zip(site.scaled, scales, strict=True)).get(what) for what in "kv")
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
        bases = [fn.at(keys, block * (dim * LANES), unit(site.forms[0])) for block in pair]
        step = next(s for s in (4, 2, 1) if dim % s == 0)
        with fn.loop(0, dim, step, [zero] * (2 * tile)) as inner:
            sums = list(inner.carried)
            for s in range(step):
                k = [load(fn, base, (inner.index + s) * LANES, site.forms[0]) for base in bases]
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
            factor = wide_scale
            if key_scales is not None:
                factor = fn.load(key_scales, VF, pair[half] * LANES, "f32") * wide_scale
            for j in range(tile):
                score = inner.results[2 * j + half] * factor
                if site.softcap:
                    score = vm.tanh(fn, score * (1 / site.softcap)) * site.softcap
                if site.slopes:
                    distance = fn.cast(pos - fn.splat(fn.i32(word(j, POS))), "arith.sitofp", VF)
                    slope = fn.splat(fn.cast(fn.i32(word(j, SLOPE)), "arith.bitcast", "f32"))
                    score = fn.fma(distance, slope, score)
                seen = both(fn, there, fn.compare(pos, "sle", high[j]))
                near = _either(fn, fn.compare(pos, "sge", low[j]), fn.compare(pos, "slt", sinks_v))
                seen = both(fn, seen, near)
                if site.drafted:
                    bits = fn.splat(fn.i32((word(j, BITS) >> (pair[half] * LANES)) & 255))
                    bits = fn.select(fn.compare(word(j, BITS), "eq", 0), fn.const(255, VI), bits)
                    seen = both(fn, seen, fn.compare(bits & lane_bits, "ne", 0))
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
            share = p
            if value_scales is not None:
                share = p * fn.load(value_scales, VF, (first + weights.index) * LANES, "f32")
            fn.store(share, scores, at, "f32")
            weights.give(weights.carried[0] + p)
        total = fn.load(sums[j], "f32", vdim + 1) * scales[j] + fn.sum(weights.results[0])
        fn.store(top, sums[j], vdim)
        fn.store(total, sums[j], vdim + 1)
    begin = first * LANES
    for start in range(0, vdim, 4 * LANES):
        lanes = [c for c in range(start, min(vdim, start + 4 * LANES), LANES)]
        old = [fn.load(sums[j], VF, c, "f32") * fn.splat(scales[j]) for j in range(tile) for c in lanes]
        with fn.loop(begin, stop, 1, old) as entries:
            rows = [load(fn, values, entries.index * vdim + c, site.forms[1]) for c in lanes]
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


def both(fn: Fn, a: Val, b: Val) -> Val:
    return fn.emit(f"arith.andi {a.name}, {b.name} : {a.type}", a.type)


def _either(fn: Fn, a: Val, b: Val) -> Val:
    return fn.emit(f"arith.ori {a.name}, {b.name} : {a.type}", a.type)
