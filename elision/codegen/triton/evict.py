"""Eviction on the clock: which entries of a list stay (`elision.ir.ops.choose.keep`), and which of these move, so that no gaps
are left (`elision.ir.evict`).

The n-th largest rank of a list is found bit by bit, by counting; equal ranks are settled by their positions in the same way. The
entries themselves are moved by `move`, and their scores by `move_scores`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.order import LOWEST, MOST


@triton.jit
def evict(
    source, target, score, pos, start, length, other, entries, wide, n, recent, sinks,
    H: tl.constexpr, LISTS: tl.constexpr, SCORED: tl.constexpr, POOL: tl.constexpr, POOL_RECENT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (list). Of sequences that have a token in the call (``start``), lists of more than ``n`` entries keep the first
    ``sinks`` and the last ``recent`` positions and the best of the rest: if ``SCORED`` by ``score f32[sequences, H, wide]``,
    summed over the heads of a list and over ``POOL`` neighbours, else by position. ``source``, ``target i64[sequences * LISTS,
    n]``: kept entries behind the first n, and the free slots before that they go to; then -1. Lengths are set."""
    list_ = tl.program_id(0).to(tl.int64)
    b = list_ // LISTS
    source += list_ * n
    target += list_ * n
    for at in range(0, n, BN):
        slot = at + tl.arange(0, BN)
        tl.store(source + slot, tl.full([BN], -1, tl.int64), mask=slot < n)
        tl.store(target + slot, tl.full([BN], -1, tl.int64), mask=slot < n)
    tl.debug_barrier()
    count = tl.load(length + list_).to(tl.int32)
    if (count > n) & (tl.load(start + b + 1) > tl.load(start + b)):
        pos += list_ * entries
        if SCORED:
            score += (b * H + list_ % LISTS) * wide
        newest = _newest(pos, count, BN)
        least = tl.zeros([], tl.int32) + LOWEST
        for bit in range(0, 32):
            tried = tl.where(bit == 0, 0, least | (1 << (31 - tl.maximum(bit, 1))))
            reached = _reached(
                score, pos, count, tried, LOWEST, newest, recent, sinks, wide, H, LISTS, SCORED, POOL, POOL_RECENT, BN
            )
            least = tl.where(reached >= n, tried, least)
        last = tl.zeros([], tl.int32)  # of the positions with the least rank that stay
        for bit in range(0, 31):
            tried = last | (1 << (30 - bit))
            reached = _reached(
                score, pos, count, least, tried, newest, recent, sinks, wide, H, LISTS, SCORED, POOL, POOL_RECENT, BN
            )
            last = tl.where(reached <= n, tried, last)
        free = tl.zeros([], tl.int32)
        late = tl.zeros([], tl.int32)
        for at in range(0, count, BN):
            slot = at + tl.arange(0, BN)
            inside = slot < count
            place = tl.load(pos + slot, mask=inside, other=0)
            rank = _rank(score, pos, slot, inside, count, newest, recent, sinks, wide, H, LISTS, SCORED, POOL, POOL_RECENT)
            kept = inside & ((rank > least) | ((rank == least) & (place < last)))
            gap = (slot < n) & inside & ~kept
            moves = (slot >= n) & kept
            tl.store(target + free + tl.cumsum(gap.to(tl.int32), 0) - 1, slot.to(tl.int64), mask=gap)
            tl.store(source + late + tl.cumsum(moves.to(tl.int32), 0) - 1, slot.to(tl.int64), mask=moves)
            free += tl.sum(gap.to(tl.int32), 0)
            late += tl.sum(moves.to(tl.int32), 0)
        tl.store(length + list_, n.to(tl.int64))
        tl.store(other + list_, n.to(tl.int64))


@triton.jit
def _newest(pos, count, BN: tl.constexpr):
    found = tl.zeros([BN], tl.int32)
    for at in range(0, count, BN):
        slot = at + tl.arange(0, BN)
        found = tl.maximum(found, tl.load(pos + slot, mask=slot < count, other=0))
    return tl.max(found, 0)


@triton.jit
def _rank(
    score, pos, slot, inside, count, newest, recent, sinks, wide, H: tl.constexpr, LISTS: tl.constexpr, SCORED: tl.constexpr,
    POOL: tl.constexpr, POOL_RECENT: tl.constexpr,
):  # fmt: skip
    """An integer in the order in which entries stay; scores are not negative, so their bits are."""
    place = tl.load(pos + slot, mask=inside, other=0)
    rank = place
    if SCORED:
        total = tl.zeros(slot.shape, tl.float32)
        for i in tl.static_range(POOL):  # neighbours lie side by side: nothing was evicted before
            near = slot + i - POOL // 2
            counted = (near >= 0) & (near < count)
            if POOL > 1:
                counted &= tl.load(pos + near, mask=counted, other=0) <= newest - POOL_RECENT
            for h in tl.static_range(H // LISTS):
                total += tl.load(score + h * wide + near, mask=counted, other=0.0)
        rank = (total / POOL).to(tl.int32, bitcast=True)
    return tl.where((place < sinks) | (place > newest - recent), MOST, rank)


@triton.jit
def _reached(
    score, pos, count, least, before, newest, recent, sinks, wide, H: tl.constexpr, LISTS: tl.constexpr, SCORED: tl.constexpr,
    POOL: tl.constexpr, POOL_RECENT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """How many ranks are not under ``least``; with ``before`` those equal to it count at positions before that only."""
    total = tl.zeros([BN], tl.int32)
    for at in range(0, count, BN):
        slot = at + tl.arange(0, BN)
        inside = slot < count
        rank = _rank(score, pos, slot, inside, count, newest, recent, sinks, wide, H, LISTS, SCORED, POOL, POOL_RECENT)
        level = (rank == least) & ((before < 0) | (tl.load(pos + slot, mask=inside, other=0) < before))
        total += (inside & ((rank > least) | level)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def move_scores(score, source, target, wide, n, H: tl.constexpr, LISTS: tl.constexpr, BN: tl.constexpr):
    """Scores go with their entries; program (run of moves, sequence * H + cache head)."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    list_ = (row * LISTS + h % LISTS).to(tl.int64) * n
    slot = tl.load(source + list_ + i, mask=i < n, other=-1)
    place = tl.load(target + list_ + i, mask=i < n, other=0)
    score += tl.program_id(1).to(tl.int64) * wide
    tl.store(score + place, tl.load(score + slot, mask=slot >= 0, other=0.0), mask=slot >= 0)
