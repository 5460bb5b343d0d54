"""A tile of attention: a few queries of one head of a cache, and what their words in memory say.

A tile has `WORDS` words for each query, then what its queries see together (`SIGHT`), then the sum of queries that are not
there (`SPARE`).
"""

from __future__ import annotations

from collections.abc import Mapping

from elision.codegen.cpu.emit import Fn, Val
from elision.codegen.cpu.rows import channels

TILE = 6  # queries that share one pass over the entries
QUERY, LOW, HIGH, BITS, SLOPE, POS, SUM, LEFT, LEFT_NODES, WORDS = 0, 1, 2, 3, 4, 5, 6, 7, 8, 10  # words of a query
PAD = 16  # floats after a partial sum: the largest score, the sum of weights, what the last pass scaled the sum by
HIDDEN = -1e30  # the score of what is not seen
#: Of the first positions in sight the least and the most, then of the last ones.
SIGHT = TILE * WORDS
SPARE = SIGHT + 8
_FAR = 1 << 30


def tile_words(vdim: int) -> int:
    """Words of a tile whose values have ``vdim`` channels."""
    return SPARE + (vdim + PAD) // 2


def put(fn: Fn, tile: Val, index: Val, items: Mapping[int, Val]) -> None:
    """Write the words of the query ``index``."""
    query = fn.at(tile, index * WORDS, "i64")
    for at, item in items.items():
        fn.store(item, query, at, "i64")


def clear(fn: Fn, target: Val, vdim: int) -> None:
    """A partial sum of nothing."""
    channels(fn, vdim, lambda c, type: fn.store(fn.const(0.0, type), target, c, "f32"))
    fn.store(fn.const(HIDDEN, "f32"), target, vdim)
    fn.store(fn.const(0.0, "f32"), target, vdim + 1)


def bounds(fn: Fn, where: Val, window: Val, chunk: Val, full: Val) -> tuple[Val, Val]:
    """The first and the last position in sight from ``where``."""
    far = fn.const(_FAR, "i64")
    low = fn.select(fn.compare(window, "sgt", 0), where - window + 1, fn.const(-_FAR, "i64"))
    whole = fn.maximum(chunk, 1)
    low = fn.select(fn.compare(chunk, "sgt", 0), (where // whole) * whole, low)
    return low, fn.select(fn.compare(full, "eq", 1), far, where)


def nothing(fn: Fn) -> list[Val]:
    """The sight of no query, to be widened."""
    far = fn.const(_FAR, "i64")
    return [far, -far, far, -far]


def widened(fn: Fn, sight: list[Val], low: Val, high: Val) -> list[Val]:
    """The sight with that of one more query."""
    pairs = ((sight[0], sight[1], low), (sight[2], sight[3], high))
    return [found for least, most, x in pairs for found in (fn.minimum(least, x), fn.maximum(most, x))]
