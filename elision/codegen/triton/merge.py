"""From an axis of tokens to one of fewer: which they are, sums and means of those that became one (`elision.ir.ops.axes`)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compact(index, to_pos, place, chosen, pos, start, kept, ASSIGN: tl.constexpr, BN: tl.constexpr):
    """The tokens that stay, in order: ``index``, ``to_pos i64[kept]`` are their places and positions; ``place i64[tokens]`` of
    each is where it is now. ``chosen``: if ``ASSIGN`` the token that each joins (itself: it stays), else whether it stays.
    Program (sequence); ``start``, ``kept``: where sequences begin on both axes."""
    row = tl.program_id(0)
    begin, to = tl.load(start + row), tl.load(kept + row)
    count = (tl.load(start + row + 1) - begin).to(tl.int32)
    for at in range(0, count, BN):
        i = at + tl.arange(0, BN)
        token = begin + i
        inside = i < count
        if ASSIGN:
            stays = inside & (tl.load(chosen + token, mask=inside, other=-1) == token)
        else:
            stays = inside & (tl.load(chosen + token, mask=inside, other=0) != 0)
        new = to + tl.cumsum(stays.to(tl.int32), 0) - 1
        tl.store(index + new, token, mask=stays)
        tl.store(to_pos + new, tl.load(pos + token, mask=stays, other=0), mask=stays)
        tl.store(place + token, new, mask=stays)
        to += tl.sum(stays.to(tl.int32), 0)


@triton.jit
def joined(y, assign, place, count, BLOCK: tl.constexpr):
    """``y i64[tokens]``: where on the new axis the token is that each became part of; program (run of ``BLOCK`` tokens)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(assign + at, mask=at < count, other=0)
    tl.store(y + at, tl.load(place + token, mask=at < count, other=0), mask=at < count)


@triton.jit
def merge(
    y, x, assign, weight, index, row, start, K: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """``y [kept, K]``: sums of the tokens ``x [tokens, K]`` that ``assign`` the kept one, if ``WEIGHTED`` their mean by
    ``weight [tokens]``; program (kept token, run of ``BK`` channels). Tokens of a sequence are looked through in order, so that
    the sums are the same every time."""
    token = tl.program_id(0).to(tl.int64)
    own, b = tl.load(index + token), tl.load(row + token)
    begin, end = tl.load(start + b), tl.load(start + b + 1)
    channel = tl.program_id(1) * BK + tl.arange(0, BK)
    total = tl.zeros([BK], tl.float32)
    mass = tl.zeros([BN], tl.float32)
    for at in range(begin, end, BN):
        each = at + tl.arange(0, BN)
        joins = (each < end) & (tl.load(assign + each, mask=each < end, other=-1) == own)
        if tl.max(joins.to(tl.int32), 0) > 0:
            inside = joins[:, None] & (channel < K)[None, :]
            found = tl.load(x + each[:, None] * K + channel[None, :], mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                share = tl.load(weight + each, mask=joins, other=0.0).to(tl.float32)
                mass += share
                found *= share[:, None]
            total += tl.sum(found, 0)
    if WEIGHTED:
        total /= tl.sum(mass, 0)
    tl.store(y + token * K + channel, total.to(y.dtype.element_ty), mask=channel < K)
