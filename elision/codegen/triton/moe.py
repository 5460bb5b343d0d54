"""Mixture of experts (Shazeer et al. 2017): the experts of every token, and their products, a pair of token and expert at a
time."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.weights import halves, inputs, tile


@triton.jit
def route(
    weight, index, x, bias, eps, scale, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
    RENORMALISE: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """``weight [tokens, K]`` and ``index i64[tokens, K]`` of router logits ``x [tokens, N]`` (`elision.ir.ops.moe.route`, of one
    group); program (token)."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, NP)
    inside = expert < N
    logit = tl.load(x + token * N + expert, mask=inside, other=float("-inf")).to(tl.float32)
    if KIND == "softmax":
        odds = tl.exp(logit - tl.max(logit, 0))
        share = odds / tl.sum(odds, 0)
    else:
        share = tl.where(inside, 1 / (1 + tl.exp(-logit)), 0.0)
    worth = logit
    if BIASED:
        worth = tl.where(inside, share + tl.load(bias + expert, mask=inside, other=0.0).to(tl.float32), float("-inf"))
    total = tl.zeros([], tl.float32) + eps
    left = worth
    for j in tl.static_range(K):
        first = _first_best(left, expert, inside, NP)
        total += tl.sum(tl.where(expert == first, share, 0.0), 0)
        tl.store(index + token * K + j, first.to(tl.int64))
        left = tl.where(expert == first, float("-inf"), left)
        inside &= expert != first
    inside = expert < N
    for j in tl.static_range(K):
        first = _first_best(worth, expert, inside, NP)
        found = tl.sum(tl.where(expert == first, share, 0.0), 0)
        if RENORMALISE:
            found /= total
        tl.store(weight + token * K + j, (found * scale).to(weight.dtype.element_ty))
        inside &= expert != first


@triton.jit
def _first_best(worth, expert, inside, NP: tl.constexpr):
    top = tl.max(tl.where(inside, worth, float("-inf")), 0)
    return tl.min(tl.where(inside & (worth == top), expert, NP - 1), 0)


@triton.jit
def expert_gemv(
    y, x, gate, index, w, d, m,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, EXPERTS: tl.constexpr, PICKED: tl.constexpr, SHARED: tl.constexpr,
    WEIGHTED: tl.constexpr, PARTS: tl.constexpr, EXPR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y [tokens, PICKED, N] = EXPR(w[e] x)`` of the experts ``e = index [tokens, PICKED]``, ``w [EXPERTS, PARTS N, K]``, whose
    rows are the operands of the expression one after the other; program (pair, outputs / BN). ``SHARED``: x is the token's, else
    the pair's own; ``WEIGHTED``: x is multiplied with ``gate`` first."""
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(index + pair)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    x += (pair // PICKED if SHARED else pair) * K
    first = _dot(x, w, d, m, expert * (PARTS * N), column, N, K, FORMAT, BN, BK)
    second = first
    if PARTS == 2:
        second = _dot(x, w, d, m, expert * (PARTS * N) + N, column, N, K, FORMAT, BN, BK)
    if WEIGHTED:
        factor = tl.load(gate + pair).to(tl.float32)
        first, second = first * factor, second * factor
    tl.store(y + pair * N + column, EXPR(first, second).to(y.dtype.element_ty), mask=column < N)


@triton.jit
def _dot(
    x, w, d, m, base, column, N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Products ``[BN]`` of one input with the rows ``base + column``."""
    codes: tl.constexpr = K // halves(FORMAT)
    row, wanted = (base + column)[:, None], (column < N)[:, None]
    sums = tl.zeros([BN, BK], tl.float32)
    for start in range(0, codes, BK):
        at = start + tl.arange(0, BK)
        for half in tl.static_range(halves(FORMAT)):
            value = tl.load(x + inputs(at, half, FORMAT), mask=at < codes, other=0.0).to(tl.float32)
            sums += tile(w, d, m, row, wanted, start, half, FORMAT, K, BK).to(tl.float32) * value[None, :]
    return tl.sum(sums, 1)


@triton.jit
def mixed(y, x, gate, N: tl.constexpr, PICKED: tl.constexpr, WEIGHTED: tl.constexpr, BN: tl.constexpr):
    """``y [tokens, N]``, the sum of the experts' ``x [tokens, PICKED, N]``, times ``gate [tokens, PICKED]`` if ``WEIGHTED``;
    program (token, run of channels)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for j in tl.static_range(PICKED):
        part = tl.load(x + (token * PICKED + j) * N + at, mask=at < N, other=0.0).to(tl.float32)
        total += part * tl.load(gate + token * PICKED + j).to(tl.float32) if WEIGHTED else part
    tl.store(y + token * N + at, total.to(y.dtype.element_ty), mask=at < N)
