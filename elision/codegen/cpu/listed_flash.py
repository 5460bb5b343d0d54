"""The inner part of attention over listed blocks of a cache (`elision.codegen.cpu.flash` is that over blocks side by side).

All queries of a tile read the same blocks, and see all of their entries, or of each block those that its bits say.
"""

from __future__ import annotations

from elision.codegen.cpu.cache_rows import BYTES, load
from elision.codegen.cpu.emit import PTR, Fn, Val, lanes, vector
from elision.codegen.cpu.flash import CHUNK, VF, Site, columns
from elision.codegen.cpu.tile import QUERY, SUM, WORDS
from elision.ir.layout import LANES


def listed_flash(name: str, site: Site, tile: int, weigh: str) -> Fn:
    """``flash(tile, scores, k, v, pos, first, last, scale, [k_scale, v_scale,] blocks[, list])``: the blocks whose numbers are
    ``blocks[first .. last - 1]``, at most `CHUNK`, added to the partial sums of ``tile`` queries. Of a site that is ``partly``
    seen: ``list``, the entries that are."""
    args = [("tile", PTR), ("scores", PTR), ("k", PTR), ("v", PTR), ("pos", PTR), ("first", "i64"), ("last", "i64")]
    args += [("scale", "f32"), *((f"{what}_scale", PTR) for what in site.scaled), ("blocks", PTR)]
    fn = Fn(name, args + [("list", PTR)] * bool(site.partly))
    words, scores, keys, values, positions, first, last, scale, *rest = fn.args
    chosen = rest.pop() if site.partly else None
    blocks, scales = rest.pop(), dict(zip(site.scaled, rest, strict=True))
    queries = [fn.load(words, PTR, j * WORDS + QUERY, "i64") for j in range(tile)]
    if chosen is not None:  # just these values come
        begins, row = fn.at(blocks, 2 * site.partly, "i64"), site.vdim * BYTES[site.forms[1]]
        with fn.loop(fn.load(begins, "i64", first), fn.load(begins, "i64", last)) as loop:
            coming = fn.at(values, fn.load(chosen, "i64", loop.index) * row)
            for line in range(0, row, 64):
                fn.prefetch(fn.at(coming, line))
    done = last - (last - first) % site.together
    for begin, end, n in ((first, done, site.together), (done, last, 1))[: 1 + (site.together > 1)]:
        _products(fn, site, queries, scores, keys, values, first, begin, end, n, fn.splat(scale, LANES), scales.get("k"), blocks)
    more = [scales["v"]] if "v" in scales else []
    count, no = fn.const(tile, "i64"), fn.const(0, "i1")
    fn.call(weigh, words, scores, positions, first, last, last, last, no, count, *more, blocks)
    sums = [fn.load(words, PTR, j * WORDS + SUM, "i64") for j in range(tile)]
    _values(fn, site, sums, scores, keys, values, first, last, blocks, chosen)
    fn.returns()
    return fn


def _products(
    fn: Fn, site: Site, queries: list[Val], scores: Val, keys: Val, values: Val, first: Val, begin: Val, end: Val, n: int,
    scale: Val, key_scales: Val | None, blocks: Val,
) -> None:  # fmt: skip
    """``scores[query][entry]`` of blocks ``begin .. end - 1``, ``n`` at a time. Their values come meanwhile, if all are seen."""
    dim, form = site.dim, str(site.forms[0])
    step, size = next(s for s in (2, 1) if dim % s == 0), LANES * site.vdim * BYTES[site.forms[1]]
    ahead = -(-size * step // (dim * 64)) * 64  # bytes of values for a step of keys
    with fn.loop(begin, end, n) as loop:
        numbers = [fn.load(blocks, "i64", loop.index + i) for i in range(n)]
        starts = [fn.at(keys, number * (dim * LANES * BYTES[form])) for number in numbers]
        coming = [] if site.partly else [fn.at(values, number * size) for number in numbers]
        with fn.loop(0, dim, step, [fn.const(0.0, VF)] * (n * len(queries))) as inner:
            sums = list(inner.carried)
            for place in coming:
                for line in range(0, ahead, 64):
                    fn.prefetch(fn.at(place, (inner.index // step) * ahead + line))
            for s in range(step):
                k = [load(fn, start, (inner.index + s) * LANES, form, LANES) for start in starts]
                for j, query in enumerate(queries):
                    q = fn.splat(fn.load(query, "f32", inner.index + s), LANES)
                    for i in range(n):
                        sums[j * n + i] = fn.fma(k[i], q, sums[j * n + i])
            inner.give(*sums)
        place = fn.at(scores, (loop.index - first) * LANES, "f32")
        for i, number in enumerate(numbers):
            factor = scale if key_scales is None else fn.load(key_scales, VF, number * LANES, "f32") * scale
            for j in range(len(queries)):
                fn.store(inner.results[j * n + i] * factor, place, (j * CHUNK + i) * LANES, "f32")


def _values(
    fn: Fn, site: Site, sums: list[Val], weights: Val, keys: Val, values: Val, first: Val, last: Val, blocks: Val,
    chosen: Val | None,
) -> None:  # fmt: skip
    """The entries of blocks ``first .. last - 1``, those in the list ``chosen`` or all, times their weights. The keys of the
    blocks behind them come meanwhile."""
    form, vdim = str(site.forms[1]), site.vdim
    size = site.dim * BYTES[site.forms[0]]
    for group in columns(vdim, site.together):
        begins = group[0][0] == 0
        wide = [(j, c, vector("f32", n)) for j in range(len(sums)) for c, n in group]
        scales = [fn.load(total, "f32", vdim + 2) for total in sums]
        old = [fn.load(sums[j], type, c, "f32") * fn.splat(scales[j], lanes(type)) for j, c, type in wide]
        with fn.loop(first, last, 1, old) as each:
            low, high, place = fn.const(0, "i64"), fn.const(LANES, "i64"), fn.load(blocks, "i64", each.index) * LANES
            if chosen is not None:
                begin = fn.at(blocks, 2 * site.partly, "i64")
                low, high = fn.load(begin, "i64", each.index), fn.load(begin, "i64", each.index + 1)
            coming = fn.at(keys, fn.load(blocks, "i64", each.index + (last - first)) * (size * LANES))
            if begins and chosen is not None:
                for line in range(0, size * LANES, 64):
                    fn.prefetch(fn.at(coming, line))
            with fn.loop(low, high, 1, each.carried) as entries:
                lane = entries.index if chosen is None else fn.load(chosen, "i64", entries.index) - place
                if begins and chosen is None:
                    for line in range(0, size, 64):
                        fn.prefetch(fn.at(coming, lane * size + line))
                rows = {c: load(fn, values, (place + lane) * vdim + c, form, n) for c, n in group}
                weight = fn.at(weights, (each.index - first) * LANES + lane, "f32")
                found = []
                for i, (j, c, type) in enumerate(wide):
                    p = fn.splat(fn.load(weight, "f32", j * CHUNK * LANES), lanes(type))
                    found.append(fn.fma(rows[c], p, entries.carried[i]))
                entries.give(*found)
            each.give(*entries.results)
        for (j, c, _), total in zip(wide, each.results, strict=True):
            fn.store(total, sums[j], c, "f32")
