"""How much tokens resemble one another: the cosines of their keys, and of every token the most similar of some others."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.dot import dot


@triton.jit
def unit(y, x, x_stride, H: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, FORM: tl.constexpr):
    """Keys ``x [tokens, H, D]`` of length 1, float32; program (token). ``FORM``: "mean": of the mean over heads, ``y [tokens,
    D]``; "heads": of every head, ``y [tokens, H D]``; "whole": these together again."""
    token = tl.program_id(0).to(tl.int64)
    head, channel = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
    inside = (head < H) & (channel < D)
    found = tl.load(x + token * x_stride + head * D + channel, mask=inside, other=0.0).to(tl.float32)
    if FORM == "mean":
        mean = tl.sum(found, 0) / H
        place = tl.arange(0, DP)
        size = tl.maximum(tl.sqrt(tl.sum(mean * mean, 0)), 1e-12)
        tl.store(y + token * D + place, mean / size, mask=place < D)
    else:
        found /= tl.maximum(tl.sqrt(tl.sum(found * found, 1)), 1e-12)[:, None]
        if FORM == "whole":
            found /= tl.maximum(tl.sqrt(tl.sum(tl.sum(found * found, 1), 0)), 1e-12)
        tl.store(y + token * (H * D) + head * D + channel, found, mask=inside)


@triton.jit
def nearest(
    best, to, x, side, start, W: tl.constexpr, SIDED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """For the tokens that ask, the largest product of their rows of ``x f32[tokens, W]`` with one that answers, in the same
    sequence, and whose it is, of equal ones the first: ``best f32[tokens]``, ``to i64[tokens]``. Tokens of even rank ask those of
    odd rank, or (``SIDED``) those of ``side`` 1 those of side 2, and of others ``best`` is -inf.
    Program (tile of tokens, sequence)."""
    STEP: tl.constexpr = 1 if SIDED else 2
    row = tl.program_id(1)
    begin = tl.load(start + row)
    count = (tl.load(start + row + 1) - begin).to(tl.int32)
    rank = (tl.program_id(0) * BM + tl.arange(0, BM)) * STEP
    token, asks = begin + rank, rank < count
    if SIDED:
        asks &= tl.load(side + token, mask=asks, other=0) == 1
    top = tl.full([BM], float("-inf"), tl.float32)
    found = rank
    if tl.max(asks.to(tl.int32), 0) > 0:
        for at in range(STEP - 1, count, BN * STEP):
            place = at + tl.arange(0, BN) * STEP
            other, answers = begin + place, place < count
            if SIDED:
                answers &= tl.load(side + other, mask=answers, other=0) == 2
            s = tl.zeros([BM, BN], tl.float32)
            for first in range(0, W, BK):
                channel = first + tl.arange(0, BK)
                a = tl.load(x + token[:, None] * W + channel[None, :], mask=asks[:, None] & (channel < W)[None, :], other=0.0)
                b = tl.load(x + other[:, None] * W + channel[None, :], mask=answers[:, None] & (channel < W)[None, :], other=0.0)
                s += dot(a, tl.trans(b))
            s = tl.where(answers[None, :], s, float("-inf"))
            most = tl.max(s, 1)
            which = tl.min(tl.where((s == most[:, None]) & answers[None, :], place[None, :], count), 1)
            found = tl.where(most > top, which, found)
            top = tl.maximum(top, most)
    tl.store(best + token, tl.where(asks, top, float("-inf")), mask=rank < count)
    tl.store(to + token, begin + found, mask=asks)
