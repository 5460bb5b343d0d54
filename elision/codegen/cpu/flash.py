"""The inner part of attention: entries of a cache added to the partial sums of a few queries.

Entries of a block are the lanes of one vector when scores are computed, channels are when values are summed. Codes of integers
are widened in registers: the scale of a whole key multiplies its score, that of a whole value its weight, and codes in groups
become floats at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from elision.codegen.cpu import grouped
from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.cache_rows import Form, load, row_bytes, scaled
from elision.codegen.cpu.emit import PTR, Fn, Val, lanes, vector
from elision.codegen.cpu.grouped import Grouped
from elision.codegen.cpu.mended import Mended
from elision.codegen.cpu.tile import BITS, HIDDEN, HIGH, LEFT, LEFT_NODES, LOW, POS, QUERY, SLOPE, SUM, TILE, WORDS
from elision.ir.layout import LANES
from elision.llvm.processor import needs

CHUNK = 16  # blocks of entries that are scored before their values are summed
VF, VI = vector("f32", LANES), vector("i32", LANES)


@dataclass(frozen=True)
class Site:
    """What is fixed in the code of an attention site."""

    heads: int  # of the cache
    group: int  # query heads of each
    dim: int
    vdim: int
    forms: tuple[Form, Form]  # of keys and of values (`elision.codegen.cpu.cache_rows`)
    drafted: bool
    ordered: bool  # entry i holds position i
    together: int  # blocks, or vectors of channels, that are summed at a time
    softcap: float = 0.0
    slopes: bool = False
    sinks: bool = False
    own: bool = False  # the cache holds just the tokens of the call, which may skip positions
    first: int = 0  # positions that a window shows besides
    apart: bool = False  # every head has a list of entries of its own
    observed: bool = False  # scores are left in the cache (`elision.ir.scores`)
    behind: bool = False  # every query sees all committed entries
    older: tuple[Form, Form] | None = None  # of a segment before the one that is appended to
    listed: bool = False  # blocks are named by a list (`elision.codegen.cpu.listed_flash`)
    #: Words from the numbers of listed blocks to bits that say which of their entries are seen, and from these to where the
    #: entries of each block begin in a list of all; 0: all are seen.
    partly: int = 0
    near: bool = False  # what is read was written just now, so nothing needs to be fetched

    @property
    def queries(self) -> int:
        return self.heads * self.group

    @property
    def scaled(self) -> str:
        """Which of keys (``k``) and values (``v``) have scales."""
        return "".join(what for what, form in zip("kv", self.forms, strict=True) if scaled(form))

    @property
    def beside(self) -> list[str]:
        """The arrays beside the codes of keys and values."""
        found = []
        for what, form in zip("kv", self.forms, strict=True):
            names = form.beside if not isinstance(form, str) else ("scale",) if scaled(form) else ()
            found += [f"{what}_{name}" for name in names]
        return found

    @property
    def before(self) -> Site | None:
        """The site on the older segment, if there is one: there are no drafts in it."""
        return None if self.older is None else replace(self, forms=self.older, older=None)

    @property
    def block(self) -> int:
        """Entries that become floats together before they are read; 0: none do."""
        return max(form.block if isinstance(form, Mended) else 0 for form in self.forms)

    @property
    def read(self) -> Site:
        """The site on the floats that its entries become before they are read, or itself."""
        return replace(self, forms=("f32", "f32"), near=True) if self.block else self

    @property
    def tiles(self) -> list[int]:
        """Queries of the tiles that there is code for: a full one, and what is left of a token's queries."""
        return sorted({TILE, self.group % TILE or TILE})


def together(level: str) -> int:
    """`Site.together` for a feature level: a tile's sums fill 24 of 32 registers of a vector, or 12 of 16 of half a vector."""
    return 4 if "avx512f" in needs(level) else 1


def flash(name: str, site: Site, tile: int, weigh: str) -> Fn:
    """``flash(tile, scores, k, v, pos, first, last, limit, masked, nodes, scale)``: entries of blocks ``first .. last - 1``, at
    most `CHUNK`, added to the partial sums of ``tile`` queries; the arguments beyond are those of `weigh`. What lies beside the
    codes of keys and values follows (`Site.beside`)."""
    args = [("tile", PTR), ("scores", PTR), ("k", PTR), ("v", PTR), ("pos", PTR), ("first", "i64"), ("last", "i64")]
    args += [("limit", "i64"), ("masked", "i64"), ("nodes", "i1"), ("scale", "f32")]
    fn = Fn(name, args + [(name, PTR) for name in site.beside])
    words, scores, keys, values, positions, first, last, limit, masked, nodes, scale, *arrays = fn.args
    beside = dict(zip(site.beside, arrays, strict=True))
    key_scales, value_scales = (beside[f"{what}_scale"] if what in site.scaled else None for what in "kv")
    queries, coming = [fn.load(words, PTR, j * WORDS + QUERY, "i64") for j in range(tile)], None if site.near else values
    products(fn, site, queries, scores, keys, coming, first, last, fn.splat(scale, LANES), key_scales, _of(beside, "k_"))
    count = fn.const(tile, "i64")
    more = [value_scales] if value_scales is not None else []
    fn.call(weigh, words, scores, positions, first, last, limit, masked, nodes, count, *more)
    stop = fn.emit(f"arith.minsi {limit.name}, {(last * LANES).name} : i64", "i64")
    sums = [fn.load(words, PTR, j * WORDS + SUM, "i64") for j in range(tile)]
    _values(fn, site, sums, scores, keys, values, first * LANES, stop, _of(beside, "v_"))
    fn.returns()
    return fn


def _of(beside: Mapping[str, Val], prefix: str) -> dict[str, Val]:
    return {name.removeprefix(prefix): array for name, array in beside.items() if name.startswith(prefix)}


def scores_tile(name: str, site: Site, tile: int) -> Fn:
    """``name(words, scores, k, first, last, scale[, k_scale])``: `products` of some queries with blocks of keys, no values."""
    args = [("words", PTR), ("scores", PTR), ("k", PTR), ("first", "i64"), ("last", "i64"), ("scale", "f32")]
    fn = Fn(name, args + [("k_scale", PTR)] * ("k" in site.scaled))
    words, scores, keys, first, last, scale, *key_scales = fn.args
    queries = [fn.load(words, PTR, j * WORDS + QUERY, "i64") for j in range(tile)]
    factor = key_scales[0] if key_scales else None
    products(fn, site, queries, scores, keys, None, first, last, fn.splat(scale, LANES), factor)
    fn.returns()
    return fn


def products(
    fn: Fn, site: Site, queries: list[Val], scores: Val, keys: Val, values: Val | None, first: Val, last: Val, scale: Val,
    key_scales: Val | None, beside: Mapping[str, Val] | None = None,
) -> None:  # fmt: skip
    """``scores[query][entry]``: products of queries and keys, times ``scale``. The values, if any, come meanwhile. ``beside``:
    what lies beside the codes of keys in groups."""
    dim, form = site.dim, site.forms[0]
    coded = form if isinstance(form, Grouped) else None
    step = coded.per if coded and coded.per > 1 else next(s for s in (2, 1) if dim % s == 0)
    # channels of a loop over which scales stay the same
    spans = range(0, dim, coded.group if coded and not coded.by_token else dim)

    def key(base: Val, block: Val, channel: Val, s: int, raw: Val | None, sides: list[Val]) -> Val:
        """The keys of a block at a channel, the ``s``-th of a step."""
        if not isinstance(form, Grouped) or raw is None:
            assert isinstance(form, str)
            return load(fn, base, (channel + s) * LANES, form, LANES)
        if form.by_token:
            sides = grouped.key_sides(fn, form, dim, beside or {}, block, channel + s)
        return grouped.scaled(fn, grouped.floats(fn, raw, form, s % form.per), sides[0], sides[1] if form.zero else None)

    def together(begin: Val, end: Val, n: int) -> None:
        """Blocks ``begin .. end - 1``, ``n`` at a time."""
        coming_size = n * LANES * row_bytes(site.forms[1], site.vdim)
        ahead = -(-coming_size * step // (dim * 64)) * 64  # bytes of values for a step of keys
        block_bytes = LANES * row_bytes(form, dim)
        with fn.loop(begin, end, n) as loop:
            base = fn.at(keys, loop.index * block_bytes)
            coming = None if values is None else fn.at(values, loop.index * (coming_size // n))
            totals = [fn.const(0.0, VF)] * (n * len(queries))
            for span in spans:
                sides: list[list[Val]] = [[]] * n
                if coded is not None and not coded.by_token:
                    sides = [grouped.key_sides(fn, coded, dim, beside or {}, loop.index + i, span) for i in range(n)]
                with fn.loop(span, span + spans.step, step, totals) as inner:
                    sums = list(inner.carried)
                    if coming is not None:
                        for line in range(0, ahead, 64):
                            fn.prefetch(fn.at(coming, (inner.index // step) * ahead + line))
                    blocks = [fn.at(base, i * block_bytes) for i in range(n)]
                    raw: list[Val | None] = [None] * n
                    for s in range(step):
                        if coded is not None and s % coded.per == 0:
                            at = (inner.index + s) // coded.per * LANES
                            raw = [fn.load(block, vector("i8", LANES), at, "i8") for block in blocks]
                        k = [key(blocks[i], loop.index + i, inner.index, s, raw[i], sides[i]) for i in range(n)]
                        for j, query in enumerate(queries):
                            q = fn.splat(fn.load(query, "f32", inner.index + s), LANES)
                            for i in range(n):
                                sums[j * n + i] = fn.fma(k[i], q, sums[j * n + i])
                    inner.give(*sums)
                totals = inner.results
            place = fn.at(scores, (loop.index - first) * LANES, "f32")
            for i in range(n):
                factor = scale
                if key_scales is not None:
                    factor = fn.load(key_scales, VF, (loop.index + i) * LANES, "f32") * scale
                for j in range(len(queries)):
                    fn.store(totals[j * n + i] * factor, place, (j * CHUNK + i) * LANES, "f32")

    most = site.together if coded is None else -(-site.together // 2)  # scales take registers too
    rest = last - (last - first) % most
    together(first, rest, most)
    if most > 1:
        together(rest, last, 1)


def _values(
    fn: Fn, site: Site, sums: list[Val], weights: Val, keys: Val, values: Val, begin: Val, stop: Val, beside: Mapping[str, Val]
) -> None:
    """Entries ``begin .. stop - 1`` times their weights. The keys behind them come meanwhile."""
    form, vdim = site.forms[1], site.vdim
    size = row_bytes(site.forms[0], site.dim)
    for group in columns(vdim, site.together):
        begins = group[0][0] == 0 and not site.near
        wide = [(j, c, vector("f32", n)) for j in range(len(sums)) for c, n in group]
        scales = [fn.load(total, "f32", vdim + 2) for total in sums]
        old = [fn.load(sums[j], type, c, "f32") * fn.splat(scales[j], lanes(type)) for j, c, type in wide]
        with fn.loop(begin, stop, 1, old) as entries:
            if begins:
                coming = fn.at(keys, (stop + (entries.index - begin)) * size)
                for line in range(0, size, 64):
                    fn.prefetch(fn.at(coming, line))
            if isinstance(form, Grouped):
                rows = {c: grouped.value(fn, values, beside, entries.index, c, n, vdim, form) for c, n in group}
            else:
                rows = {c: load(fn, values, entries.index * vdim + c, str(form), n) for c, n in group}
            found = []
            for i, (j, c, type) in enumerate(wide):
                p = fn.splat(fn.load(weights, "f32", entries.index - begin + j * CHUNK * LANES), lanes(type))
                found.append(fn.fma(rows[c], p, entries.carried[i]))
            entries.give(*found)
        for (j, c, _), total in zip(wide, entries.results, strict=True):
            fn.store(total, sums[j], c, "f32")


def columns(size: int, together: int) -> list[list[tuple[int, int]]]:
    """Channels in vectors, ``together`` at a time: the first one and how many of each. The last vector may be half a one."""
    every = [(c, min(LANES, size - c)) for c in range(0, size, LANES)]
    return [every[i : i + together] for i in range(0, len(every), together)]


def weigh(name: str, site: Site) -> Fn:
    """``weigh(tile, scores, pos, first, last, limit, masked, nodes, count[, value_scales])``: scores of ``count`` queries become
    weights, relative to the largest score so far. ``masked``: the block from which on a query may not see all entries; ``limit``:
    entries that there are; ``nodes``: entries are drafted nodes, of which a query sees its ancestors. The numbers of blocks come
    last, if they are listed."""
    args = [("tile", PTR), ("scores", PTR), ("pos", PTR), ("first", "i64"), ("last", "i64"), ("limit", "i64")]
    args += [("masked", "i64"), ("nodes", "i1"), ("count", "i64")]
    fn = Fn(name, args + [("v_scale", PTR)] * ("v" in site.scaled) + [("blocks", PTR)] * site.listed)
    words, scores, positions, first, last, limit, masked, nodes, count, *scales = fn.args
    blocks = scales.pop() if site.listed else None
    zero, hidden, iota = fn.const(0.0, VF), fn.const(HIDDEN, VF), fn.const(list(range(LANES)), VI)
    with fn.loop(0, count) as queries:
        query = fn.at(words, queries.index * WORDS, "i64")
        row = fn.at(scores, queries.index * (CHUNK * LANES), "f32")

        def word(i: int, query: Val = query) -> Val:
            return fn.load(query, "i64", i)

        if site.softcap or site.slopes:
            with fn.loop(first, last) as loop:
                at = (loop.index - first) * LANES
                score = fn.load(row, VF, at, "f32")
                if site.softcap:
                    score = vm.tanh(fn, score * (1 / site.softcap)) * site.softcap
                if site.slopes:
                    distance = fn.load(positions, VI, loop.index * LANES, "i32") - fn.splat(fn.i32(word(POS)), LANES)
                    slope = fn.splat(fn.cast(fn.i32(word(SLOPE)), "arith.bitcast", "f32"), LANES)
                    score = fn.fma(fn.cast(distance, "arith.sitofp", VF), slope, score)
                fn.store(score, row, at, "f32")
        if blocks is not None and site.partly:
            with fn.loop(first, last) as loop:
                at = (loop.index - first) * LANES
                bits = fn.splat(fn.i32(fn.load(blocks, "i64", loop.index + site.partly)), LANES)
                seen = fn.compare(bits & fn.const([1 << i for i in range(LANES)], VI), "ne", 0)
                fn.store(fn.select(seen, fn.load(row, VF, at, "f32"), hidden), row, at, "f32")
        with fn.loop(masked, last) as loop:
            at = (loop.index - first) * LANES
            pos = fn.load(positions, VI, loop.index * LANES, "i32")
            seen = fn.compare(fn.splat(fn.i32(loop.index * LANES), LANES) + iota, "slt", fn.splat(fn.i32(limit), LANES))
            seen = both(fn, seen, fn.compare(pos, "sle", fn.splat(fn.i32(word(HIGH)), LANES)))
            if site.first:  # as numbers without sign, what is before them is far behind
                low = fn.splat(fn.i32(fn.maximum(word(LOW), site.first) - site.first), LANES)
                seen = both(fn, seen, fn.compare(pos - site.first, "uge", low))
            else:
                seen = both(fn, seen, fn.compare(pos, "sge", fn.splat(fn.i32(word(LOW)), LANES)))
            if site.drafted:
                ancestors = fn.select(nodes, word(BITS) >> (loop.index * LANES), fn.const(-1, "i64"))
                lane_bits = fn.const([1 << i for i in range(LANES)], VI)
                seen = both(fn, seen, fn.compare(fn.splat(fn.i32(ancestors), LANES) & lane_bits, "ne", 0))
            fn.store(fn.select(seen, fn.load(row, VF, at, "f32"), hidden), row, at, "f32")
        with fn.loop(0, last - first, 1, [hidden]) as loop:
            loop.give(vm.larger(fn, loop.carried[0], fn.load(row, VF, loop.index * LANES, "f32")))
        sums = fn.load(query, PTR, SUM, "i64")
        before = fn.load(sums, "f32", site.vdim)
        top = vm.larger(fn, before, vm.largest(fn, loop.results[0]))  # a score that is no number shows in its weight
        wide_top, scale = fn.splat(top, LANES), vm.exp(fn, before - top)
        with fn.loop(0, last - first, 1, [zero]) as loop:
            at = loop.index * LANES
            score = fn.load(row, VF, at, "f32")
            p = fn.select(fn.compare(score, "ole", HIDDEN / 2), zero, vm.exp(fn, score - wide_top))
            share = p
            if scales:
                number = first + loop.index if blocks is None else fn.load(blocks, "i64", first + loop.index)
                share = p * fn.load(scales[0], VF, number * LANES, "f32")
            fn.store(share, row, at, "f32")
            if site.observed:
                left = fn.load(query, PTR, LEFT, "i64")
                if site.drafted:
                    left = fn.select(nodes, fn.load(query, PTR, LEFT_NODES, "i64"), left)
                fn.store(score, left, (first + loop.index) * LANES, "f32")
            loop.give(loop.carried[0] + p)
        total = fn.load(sums, "f32", site.vdim + 1) * scale + fn.sum(loop.results[0])
        for i, value in enumerate((top, total, scale)):
            fn.store(value, sums, site.vdim + i)
    fn.returns()
    return fn


def both(fn: Fn, a: Val, b: Val) -> Val:
    return fn.emit(f"arith.andi {a.name}, {b.name} : {a.type}", a.type)
