"""A token drawn from logits (`elision.ir.warp`, `elision.ir.noise`): temperature; top-k, top-p, min-p as one least logit; then
the largest of the rest with Gumbel noise of (seed, row, position), by the same bits as on the host.

Least logits are found bit by bit on keys in the order of the floats, by counting and by summing; equal logits stay together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.order import LOWEST, key


@triton.jit
def sample(
    chosen, best, logits, row, pos, numbers, whole, N: tl.constexpr, WIDE: tl.constexpr, STREAM: tl.constexpr, BN: tl.constexpr
):
    """``chosen i64[tokens]`` of ``logits [tokens, N]``, drawn for the position after the token's; program (token).

    ``numbers f32[sequences, 3]``: temperature (0: take the likeliest, ``best i64[tokens, WIDE]``), top-p, min-p; ``whole
    i64[sequences, 3]``: top-k (0 is off), seed, row of the noise.
    """
    token = tl.program_id(0).to(tl.int64)
    b = tl.load(row + token)
    heat = tl.load(numbers + b * 3)
    found = tl.load(best + token * WIDE)
    if heat > 0:
        logits += token * N
        most = _largest(logits, heat, N, BN)
        least = tl.zeros([], tl.int32) + LOWEST
        k = tl.load(whole + b * 3)
        if k > 0:
            least = _found(logits, heat, most, least, tl.minimum(k, N).to(tl.float64), True, N, BN)
        p = tl.load(numbers + b * 3 + 1)
        if p < 1:
            share = (1 - p).to(tl.float64) * _mass(logits, heat, most, least, 2147483647, N, BN)
            least = tl.maximum(least, tl.minimum(_found(logits, heat, most, least, share, False, N, BN), key(most)))
        p = tl.load(numbers + b * 3 + 2)
        if p > 0:
            least = tl.maximum(least, key(most + tl.log(p)))
        seed, of = tl.load(whole + b * 3 + 1), tl.load(whole + b * 3 + 2)
        found = _drawn(logits, heat, least, seed, of, tl.load(pos + token) + 1, N, STREAM, BN)
    tl.store(chosen + token, found)


@triton.jit
def _scaled(logits, at, heat, N: tl.constexpr):
    return tl.load(logits + at, mask=at < N, other=float("-inf")).to(tl.float32) / heat


@triton.jit
def _largest(logits, heat, N: tl.constexpr, BN: tl.constexpr):
    top = tl.full([BN], float("-inf"), tl.float32)
    for start in range(0, N, BN):
        top = tl.maximum(top, _scaled(logits, start + tl.arange(0, BN), heat, N))
    return tl.max(top, 0)


@triton.jit
def _mass(logits, heat, most, least, below, N: tl.constexpr, BN: tl.constexpr):
    """The sum of exp(logit - most) over keys from ``least`` on and under ``below``."""
    total = tl.zeros([BN], tl.float64)
    for start in range(0, N, BN):
        x = _scaled(logits, start + tl.arange(0, BN), heat, N)
        rank = key(x)
        total += tl.where((rank >= least) & (rank < below), tl.exp(x - most), 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _count(logits, heat, least, N: tl.constexpr, BN: tl.constexpr):
    """How many keys are not under ``least``."""
    total = tl.zeros([BN], tl.int32)
    for start in range(0, N, BN):
        at = start + tl.arange(0, BN)
        total += ((key(_scaled(logits, at, heat, N)) >= least) & (at < N)).to(tl.int32)
    return tl.sum(total, 0)


@triton.jit
def _found(logits, heat, most, least, want, COUNT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """The largest key that ``want`` keys or more reach, or (not ``COUNT``) under which there is a mass of at most ``want``."""
    zero = tl.zeros([], tl.int32)
    found = tl.where(_there(logits, heat, most, least, zero, want, COUNT, N, BN), zero, zero + LOWEST)
    for bit in range(0, 31):
        tried = found | (1 << (30 - bit))
        found = tl.where(_there(logits, heat, most, least, tried, want, COUNT, N, BN), tried, found)
    return found


@triton.jit
def _there(logits, heat, most, least, tried, want, COUNT: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    if COUNT:
        return _count(logits, heat, tried, N, BN) >= want
    else:
        return _mass(logits, heat, most, least, tried, N, BN) <= want


@triton.jit
def _drawn(logits, heat, least, seed, row, pos, N: tl.constexpr, STREAM: tl.constexpr, BN: tl.constexpr):
    """The argmax of logits with Gumbel noise, over keys from ``least`` on. A block of Philox4x32-10 is noise of four tokens."""
    top = tl.full([BN], float("-inf"), tl.float64)
    where = tl.zeros([BN], tl.int64)
    for start in range(0, (N + 3) // 4, BN):
        block = start + tl.arange(0, BN)
        zero = tl.zeros([BN], tl.uint32)
        words = tl.philox(seed, block.to(tl.uint32), zero + pos.to(tl.uint32), zero + row.to(tl.uint32), zero + STREAM)
        for w in tl.static_range(4):
            at = block * 4 + w
            x = _scaled(logits, at, heat, N)
            uniform = (words[w].to(tl.uint32, bitcast=True).to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
            worth = x.to(tl.float64) - tl.log(-tl.log(uniform))
            better = (at < N) & (key(x) >= least) & (worth > top)
            top = tl.where(better, worth, top)
            where = tl.where(better, at.to(tl.int64), where)
    first = tl.max(top, 0)
    return tl.min(tl.where(top == first, where, N), 0)
