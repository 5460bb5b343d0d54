"""Which tokens of every sequence stay, and which others they join (`elision.ir.ops.matching`, `elision.ir.ops.prompt`).

How many stay is known: the axis of those that do has been laid out (``kept``: where its sequences begin). The n-th best score of
a sequence is found bit by bit, by counting, and equal ones are settled by their places in the same way. A program is a sequence.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.order import LOWEST, MOST, key


@triton.jit
def join_similar(assign, best, to, start, kept, SKIP: tl.constexpr, BN: tl.constexpr):
    """``assign i64[tokens]``: the tokens of even rank, after the first ``SKIP``, that resemble others most (``best``) join these
    (``to``), as many as have to go; all others name themselves."""
    row = tl.program_id(0)
    begin, count, left = sequence(start, kept, row)
    least, before = least_of(best, begin, count, count - left, 2, SKIP, 0, 0, BN)
    for at in range(0, count, BN):
        i = at + tl.arange(0, BN)
        goes = among(best, begin, i, count, least, before, 2, SKIP, 0, 0)
        other = tl.load(to + begin + i, mask=goes, other=0)
        tl.store(assign + begin + i, tl.where(goes, other, begin + i), mask=i < count)


@triton.jit
def join_rest(assign, score, start, kept, FIRST: tl.constexpr, BN: tl.constexpr):
    """The best tokens stay, and the first ``FIRST`` do; the others join the best of their own, the last that is kept."""
    row = tl.program_id(0)
    begin, count, left = sequence(start, kept, row)
    least, before = least_of(score, begin, count, tl.where(left == count, left, left - 1), 1, 0, FIRST, 0, BN)
    low, ahead = least_of(score, begin, count, left, 1, 0, FIRST, 0, BN)
    target = begin * 0 + MOST
    for at in range(0, count, BN):
        i = at + tl.arange(0, BN)
        more = among(score, begin, i, count, low, ahead, 1, 0, FIRST, 0)
        more &= ~among(score, begin, i, count, least, before, 1, 0, FIRST, 0)
        target = tl.minimum(target, tl.min(tl.where(more, i, MOST), 0).to(tl.int64))
    for at in range(0, count, BN):
        i = at + tl.arange(0, BN)
        stays = among(score, begin, i, count, least, before, 1, 0, FIRST, 0)
        tl.store(assign + begin + i, begin + tl.where(stays, i.to(tl.int64), target), mask=i < count)


@triton.jit
def stays(mask, score, start, kept, FIRST: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr):
    """``mask u8[tokens]``: the first ``FIRST``, the last ``LAST`` and the best of the rest."""
    row = tl.program_id(0)
    begin, count, left = sequence(start, kept, row)
    least, before = least_of(score, begin, count, left, 1, 0, FIRST, LAST, BN)
    for at in range(0, count, BN):
        i = at + tl.arange(0, BN)
        found = among(score, begin, i, count, least, before, 1, 0, FIRST, LAST)
        tl.store(mask + begin + i, found.to(tl.uint8), mask=i < count)


@triton.jit
def sequence(start, kept, row):
    """Where a sequence begins, its tokens, and how many of them are kept."""
    begin = tl.load(start + row)
    count = (tl.load(start + row + 1) - begin).to(tl.int32)
    return begin, count, (tl.load(kept + row + 1) - tl.load(kept + row)).to(tl.int32)


@triton.jit
def least_of(
    score, begin, count, want, STEP: tl.constexpr, SKIP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr
):
    """The least rank of the best ``want`` tokens, and the place before which equal ones are among them (all, if there are no
    more)."""
    least = tl.zeros([], tl.int32) + LOWEST
    for bit in range(0, 32):
        tried = tl.where(bit == 0, 0, least | (1 << (31 - tl.maximum(bit, 1))))
        least = tl.where(_reached(score, begin, count, tried, MOST, STEP, SKIP, FIRST, LAST, BN) >= want, tried, least)
    before = tl.zeros([], tl.int32)
    for bit in range(0, 31):
        tried = before | (1 << (30 - bit))
        before = tl.where(_reached(score, begin, count, least, tried, STEP, SKIP, FIRST, LAST, BN) <= want, tried, before)
    return least, before


@triton.jit
def _reached(
    score, begin, count, least, before, STEP: tl.constexpr, SKIP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BN], tl.int32)
    for at in range(0, count, BN):
        i = at + tl.arange(0, BN)
        total += among(score, begin, i, count, least, before, STEP, SKIP, FIRST, LAST).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def among(
    score, begin, i, count, least, before, STEP: tl.constexpr, SKIP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr
):
    """Whether the tokens of rank ``i`` are over the least rank, or are it and lie before a place. Every ``STEP``-th token counts,
    after the first ``SKIP``; the first ``FIRST`` and the last ``LAST`` are over all others."""
    inside = (i < count) & (i >= SKIP) & (i % STEP == 0)
    rank = key(tl.load(score + begin + i, mask=inside, other=0.0).to(tl.float32) + 0.0)  # -0 as 0
    rank = tl.where((i < FIRST) | (i >= count - LAST), MOST, rank)
    return inside & ((rank > least) | ((rank == least) & (i < before)))
