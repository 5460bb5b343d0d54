"""Blocks of codes with outliers and a matrix of low rank beside them (`elision.ir.states.Repaired`): a block at a time becomes
floats in memory that stays in the cache, where attention reads it as it reads any floats.

The matrix is added while codes are widened, and outliers then take their places by plain stores, of which a block has few. So
all queries of a head share the work, and what they see is what the reference decodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elision.codegen.cpu import grouped
from elision.codegen.cpu.emit import PTR, Fn, Val, vector
from elision.codegen.cpu.grouped import Grouped
from elision.codegen.refusal import NotNative
from elision.ir.layout import LANES
from elision.ir.states import Repaired

if TYPE_CHECKING:
    from elision.codegen.cpu.flash import Site

FLOATS = 64  # rows that become floats before they are read, if blocks are no longer
MOST_RANK = 8
BYTES = {"f32": 4, "f16": 2, "i8": 1}
REGISTERS = 16  # that a matrix of low rank may take


@dataclass(frozen=True)
class Mended:
    """``codes`` in blocks of ``block`` rows, a matrix of rank ``rank``, ``outliers`` numbers at each end of a vector."""

    codes: Grouped
    block: int
    rank: int
    outliers: int

    @property
    def beside(self) -> tuple[str, ...]:
        """The arrays beside the codes."""
        return self.codes.beside + ("left", "right") * (self.rank > 0) + ("outlier", "place") * (self.outliers > 0)

    def width(self, dim: int) -> int:
        """Bytes of codes of a row."""
        return self.codes.width(dim)

    def place(self, name: str, dim: int, slot: Val, block: Val) -> tuple[Val, str]:
        """Where a head has its part of an array beside the codes, from its first slot and its first block on, and the type of its
        items."""
        if name in self.codes.beside:
            return self.codes.place(name, dim, slot, block)
        if name in ("left", "right"):
            return (slot * self.rank if name == "left" else block * (dim * self.rank)), "f16"
        many = 2 * self.outliers
        return (block * (many * dim) if self.codes.by_token else slot * many), "f16" if name == "outlier" else "i8"


def mended(encoding: Repaired, dim: int, keys: bool) -> Mended:
    """Raises NotNative for what kernels do not decode."""
    found = Mended(grouped.grouped(encoding.codes, dim, keys), encoding.block, encoding.rank, encoding.outliers)
    codes = encoding.codes
    legal = encoding.block % LANES == 0 and encoding.rank <= MOST_RANK and found.codes.by_token is keys
    if not legal or keys and codes.group != encoding.block:
        what = f"{'keys' if keys else 'values'} in blocks of {encoding.block} with a matrix of rank {encoding.rank}"
        raise NotNative(f"a cache of {what}; kernels take multiples of {LANES} rows, and ranks up to {MOST_RANK}")
    return found


def chunk(site: Site) -> int:
    """Blocks of 16 that become floats before they are read, a multiple of those of one block; 0: none do."""
    return site.block and max(site.block, FLOATS // site.block * site.block) // LANES


def floats_bytes(site: Site) -> int:
    """Bytes of the floats of a chunk, and of a matrix."""
    rank = max(form.rank if isinstance(form, Mended) else 0 for form in site.forms)
    return 4 * (chunk(site) * LANES * (site.dim + site.vdim) + rank * site.dim + LANES)


def functions(name: str, site: Site) -> list[Fn]:
    """What makes floats of the keys and of the values of a block."""
    pairs = zip(("keys", "values"), site.forms, (site.dim, site.vdim), strict=True)
    return [decode(f"{name}_{what}", dim, form) for what, form, dim in pairs if isinstance(form, Mended)]


def widen(
    fn: Fn, name: str, site: Site, memory: Val, k: Val, v: Val, beside: Sequence[Val], first: Val, last: Val
) -> tuple[Val, Val]:  # fmt: skip
    """Keys and values of the chunk that begins with the block of 16 ``first``, at most up to ``last``, as floats."""
    per, size, keys = site.block // LANES, chunk(site) * LANES, sum(what[0] == "k" for what in site.beside)
    values = fn.at(memory, size * site.dim, "f32")
    parts = (("keys", k, beside[:keys], memory, site.dim), ("values", v, beside[keys:], values, site.vdim))
    right = fn.at(memory, size * (site.dim + site.vdim), "f32")
    with fn.loop(first // per, fn.minimum(first + chunk(site), last) // per) as blocks:
        for what, codes, more, out, dim in parts:
            to = fn.at(out, (blocks.index - first // per) * (site.block * dim), "f32")
            fn.call(f"{name}_{what}", to, right, codes, blocks.index, *more)
    return memory, values


def decode(name: str, dim: int, form: Mended) -> Fn:
    """``name(out, right, codes, block, *beside)``: the floats of a block of keys (``out[rows / 16][dim][16]``) or of values
    (``out[rows][dim]``); ``right`` is memory for ``dim * rank`` floats. Arrays begin where those of the head do."""
    fn = Fn(name, [("out", PTR), ("wide", PTR), ("codes", PTR), ("block", "i64"), *((x, PTR) for x in form.beside)])
    out, wide, codes, block, *arrays = fn.args
    beside = dict(zip(form.beside, arrays, strict=True))
    for what, array in beside.items():  # of the block after it
        at, unit = form.place(what, dim, (block + 1) * form.block, block + 1)
        begin, end = fn.at(array, at, unit), form.place(what, dim, (block + 2) * form.block, block + 2)[0]
        with fn.loop(0, (end - at) * BYTES[unit], 64) as loop:
            fn.prefetch(fn.at(begin, loop.index))
    (_keys if form.codes.by_token else _values)(fn, dim, form, out, wide, codes, block, beside)
    if form.outliers:
        _outliers(fn, dim, form, out, block, beside["outlier"], beside["place"])
    fn.returns()
    return fn


def _columns(fn: Fn, base: Val, first: Val, lanes: int, rank: int) -> list[Val]:
    """The columns of rows ``first .. first + lanes - 1`` of a matrix ``[rows, rank]`` in float16, as vectors of floats."""
    rows = fn.cast(fn.load(base, vector("f16", lanes * rank), first * rank, "f16"), "arith.extf", vector("f32", lanes * rank))
    if rank == 1:
        return [rows]
    found = []
    for r in range(rank):
        order = ", ".join(str(i * rank + r) for i in range(lanes))
        text = f"vector.shuffle {rows.name}, {rows.name} [{order}] : {rows.type}, {rows.type}"
        found.append(fn.emit(text, vector("f32", lanes)))
    return found


def _keys(fn: Fn, dim: int, form: Mended, out: Val, wide: Val, codes: Val, block: Val, beside: Mapping[str, Val]) -> None:
    rank, per, tiles = form.rank, form.codes.per, form.block // LANES
    together = next(n for n in (4, 2, 1) if tiles % n == 0 and n * max(rank, 1) <= REGISTERS)
    if rank:  # floats, of which one at a time is multiplied with all rows

        def widened(i: Val | int, lanes: int) -> None:
            half = fn.load(beside["right"], vector("f16", lanes), block * (dim * rank) + i, "f16")
            fn.store(fn.cast(half, "arith.extf", vector("f32", lanes)), wide, i, "f32")

        _whole(dim * rank, fn, widened)
    with fn.loop(0, tiles, together) as some:
        number = block * tiles + some.index
        left = [_columns(fn, beside["left"], (number + t) * LANES, LANES, rank) if rank else [] for t in range(together)]
        after = fn.at(codes, ((block + 1) * tiles + some.index) * (dim // per * LANES))
        with fn.loop(0, dim, per) as loop:
            fn.prefetch(fn.at(after, loop.index // per * (together * LANES)))
            raw = [
                fn.load(codes, vector("i8", LANES), ((number + t) * (dim // per) + loop.index // per) * LANES, "i8")
                for t in range(together)
            ]
            for s in range(per):
                channel = loop.index + s
                sides = grouped.key_sides(fn, form.codes, dim, beside, number, channel)
                right = [fn.splat(fn.load(wide, "f32", channel * rank + r), LANES) for r in range(rank)]
                for t in range(together):
                    x = grouped.floats(fn, raw[t], form.codes, s)
                    x = grouped.scaled(fn, x, sides[0], sides[1] if form.codes.zero else None)
                    for a, b in zip(left[t], right, strict=True):
                        x = fn.fma(a, b, x)
                    fn.store(x, out, ((some.index + t) * dim + channel) * LANES, "f32")


def _values(fn: Fn, dim: int, form: Mended, out: Val, wide: Val, codes: Val, block: Val, beside: Mapping[str, Val]) -> None:
    rank = form.rank
    every = [(c, min(LANES, dim - c)) for c in range(0, dim, LANES)]
    together = max(1, REGISTERS // max(rank, 1))
    for group in (every[i : i + together] for i in range(0, len(every), together)):
        right = [_columns(fn, beside["right"], block * dim + c, n, rank) if rank else [] for c, n in group]
        with fn.loop(0, form.block) as loop:
            row = block * form.block + loop.index
            if group == every[:together]:
                fn.prefetch(fn.at(codes, (row + form.block) * form.width(dim)))
            left = [fn.cast(fn.load(beside["left"], "f16", row * rank + r), "arith.extf", "f32") for r in range(rank)]
            for (c, n), columns in zip(group, right, strict=True):
                x = grouped.value(fn, codes, beside, row, c, n, dim, form.codes)
                for a, b in zip(left, columns, strict=True):
                    x = fn.fma(fn.splat(a, n), b, x)
                fn.store(x, out, loop.index * dim + c, "f32")


def _outliers(fn: Fn, dim: int, form: Mended, out: Val, block: Val, numbers: Val, places: Val) -> None:
    """Numbers that are kept take their places: of every channel, or of every row."""
    many, keys = 2 * form.outliers, form.codes.by_token
    count = dim if keys else many * form.block
    first = block * (many * (dim if keys else form.block))

    def put(offset: Val | int) -> Callable[[Val | int, int], None]:
        def store(item: Val | int, lanes: int) -> None:
            iota = fn.const(list(range(lanes)), vector("i64", lanes))
            item = fn.value(item, "i64")
            at = first + offset + item
            x = fn.cast(fn.load(numbers, vector("f16", lanes), at, "f16"), "arith.extf", vector("f32", lanes))
            place = fn.cast(fn.load(places, vector("i8", lanes), at, "i8"), "arith.extui", vector("i64", lanes))
            item = fn.splat(item, lanes) + iota
            if keys:
                fn.scatter(x, out, ((place // LANES) * dim + item) * LANES + place % LANES)
            else:
                fn.scatter(x, out, (item // many) * dim + place)

        return store

    if keys:
        with fn.loop(0, many) as outer:
            _whole(count, fn, put(outer.index * dim))
    else:
        _whole(count, fn, put(0))


def _whole(count: int, fn: Fn, body: Callable[[Val | int, int], None]) -> None:
    """``body(first, how many)`` over ``count`` numbers, sixteen at a time and then what is left."""
    full = count // LANES * LANES
    if full:
        with fn.loop(0, full, LANES) as loop:
            body(loop.index, LANES)
    if count % LANES:
        body(full, count % LANES)
