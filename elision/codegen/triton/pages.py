"""Pages of a cache that a token reads (`elision.ir.pages`): their summaries, how large products with their keys can be, the best.

Quest (Tang et al. 2024) bounds the products of a page by the largest and smallest number of each channel of its keys; of pages of
one entry the product itself is taken (TidalDecode, Yang et al. 2024).
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import key_place, keys, rows_of
from elision.codegen.triton.order import LOWEST, MOST, key


@triton.jit
def closed(length, start, row, pos, OPEN: tl.constexpr, PENDING: tl.constexpr):
    """How many entries of a sequence are closed for a token at position ``pos``: those before the last multiple of ``OPEN``."""
    n = tl.load(length + row)
    if PENDING:
        n += tl.load(start + row + 1) - tl.load(start + row)
    return (tl.minimum(n, pos) // OPEN * OPEN).to(tl.int32)


@triton.jit
def summarise(
    summary, done, start, k, k_scale, k_low, length, blocks, pages,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FORM_K: tl.constexpr, PAGE: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """Pages of sequences in the call that are complete and have none yet; program (page, sequence * H + head). ``summary``: keys
    of 2 D channels, largest numbers first, ``pages`` slots of a head; ``done i64[sequences]``: how many pages have theirs."""
    page, row, h = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    due = tl.load(start + row + 1) > tl.load(start + row)
    if due & (page >= tl.load(done + row)) & ((page + 1) * PAGE <= tl.load(length + row)):
        place = (row * H + h).to(tl.int64)
        offset = tl.arange(0, PP)
        inside = offset < PAGE
        head, scale, least = rows_of(k, k_scale, k_low, place, blocks * 16, 0, D, FORM_K)
        found = keys(head, scale, least, page * PAGE + offset, inside, D, DP, FORM_K, tl.float32)
        channel = tl.arange(0, DP)
        high = tl.max(tl.where(inside[None, :], found, float("-inf")), 1).to(summary.dtype.element_ty)
        low = tl.min(tl.where(inside[None, :], found, float("inf")), 1).to(summary.dtype.element_ty)
        summary += place * pages * (2 * D)
        tl.store(summary + key_place(page, channel, 2 * D), high, mask=channel < D)
        tl.store(summary + key_place(page, channel + D, 2 * D), low, mask=channel < D)


@triton.jit
def summarised(done, start, length, rows, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Count the pages that `summarise` did; program (run of ``BLOCK`` sequences)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    due = tl.load(start + row + 1, mask=inside, other=0) > tl.load(start + row, mask=inside, other=0)
    tl.store(done + row, tl.load(length + row, mask=inside, other=0) // PAGE, mask=inside & due)


@triton.jit
def bounds(
    bound, q, q_stride, row, pos, start, k, k_scale, k_low, length, slots, room,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, FORM_K: tl.constexpr, SIDED: tl.constexpr,
    PAGE: tl.constexpr, OPEN: tl.constexpr, PENDING: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``bound f32[tokens, H, room]`` of closed pages: the largest over the query heads of a cache head; program (tile of pages,
    token, head). ``k``: keys of pages of one entry, or (``SIDED``) their summaries; ``slots`` of a head."""
    token, h = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b = tl.load(row + token)
    page = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = page < closed(length, start, b, tl.load(pos + token), OPEN, PENDING) // PAGE
    place = b * H + h
    channel = tl.arange(0, DP)
    wide: tl.constexpr = 2 * D if SIDED else D
    head, scale, least = rows_of(k, k_scale, k_low, place, slots, 0, wide, FORM_K)
    best = tl.full([BN], float("-inf"), tl.float32)
    if SIDED:
        there = (channel < D)[:, None] & inside[None, :]
        high = tl.load(head + key_place(page[None, :], channel[:, None], wide), mask=there, other=0.0).to(tl.float32)
        low = tl.load(head + key_place(page[None, :], channel[:, None] + D, wide), mask=there, other=0.0).to(tl.float32)
    else:
        high = keys(head, scale, least, page, inside, D, DP, FORM_K, tl.float32)
        low = high
    for g in tl.static_range(G):
        x = tl.load(q + token * q_stride + (h * G + g) * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        product = tl.maximum(x, 0.0)[:, None] * high + tl.minimum(x, 0.0)[:, None] * low
        best = tl.maximum(best, tl.sum(product, 0))
    tl.store(bound + (token * H + h) * room + page, best, mask=inside)


@triton.jit
def pick(
    picked, bound, row, pos, start, length, room, N: tl.constexpr, FIRST: tl.constexpr, H: tl.constexpr, PAGE: tl.constexpr,
    OPEN: tl.constexpr, PENDING: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``picked i64[tokens, H, N]``: the closed pages with the largest bounds, ascending, then -1; of equal ones the first,
    and the ``FIRST`` pages in any case. Program (token, head)."""
    token, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    count = closed(length, start, tl.load(row + token), tl.load(pos + token), OPEN, PENDING) // PAGE
    bound += (token * H + h) * room
    picked += (token * H + h) * N
    least = tl.zeros([], tl.int32) + LOWEST
    before = tl.zeros([], tl.int32) + MOST
    if count > N:
        for bit in range(0, 32):
            tried = tl.where(bit == 0, 0, least | (1 << (31 - tl.maximum(bit, 1))))
            least = tl.where(_reached(bound, count, tried, MOST, FIRST, BN) >= N, tried, least)
        before = tl.zeros([], tl.int32)
        for bit in range(0, 31):
            tried = before | (1 << (30 - bit))
            before = tl.where(_reached(bound, count, least, tried, FIRST, BN) <= N, tried, before)
    done = tl.zeros([], tl.int32)
    for at in range(0, count, BN):
        page = at + tl.arange(0, BN)
        kept = _kept(bound, page, count, least, before, FIRST)
        tl.store(picked + done + tl.cumsum(kept.to(tl.int32), 0) - 1, page.to(tl.int64), mask=kept)
        done += tl.sum(kept.to(tl.int32), 0)
    for at in range(0, N, BN):
        i = at + tl.arange(0, BN)
        tl.store(picked + i, tl.full([BN], -1, tl.int64), mask=(i >= done) & (i < N))


@triton.jit
def _kept(bound, page, count, least, before, FIRST: tl.constexpr):
    """Pages over the least rank, and those of it before a page."""
    rank = tl.where(page < FIRST, MOST, key(tl.load(bound + page, mask=page < count, other=0.0)))
    return (page < count) & ((rank > least) | ((rank == least) & (page < before)))


@triton.jit
def _reached(bound, count, least, before, FIRST: tl.constexpr, BN: tl.constexpr):
    total = tl.zeros([BN], tl.int32)
    for at in range(0, count, BN):
        total += _kept(bound, at + tl.arange(0, BN), count, least, before, FIRST).to(tl.int32)
    return tl.sum(total, 0)
