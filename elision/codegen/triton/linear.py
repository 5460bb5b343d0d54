"""Products of tokens with weights, with the norm before and the expression after them: ``expr(norm(x) W0.T, norm(x) W1.T,
extras)``.

RMS norm needs no pass of its own: ``norm(x) W.T = rsqrt(mean(x^2) + eps) * ((x * g) W.T)``, and the squares are summed while x is
read for the product anyway. (The products of half precision are then those of ``x * g``, rounded before the row's factor.)

``gemv`` is for one token a program: what is read is the weights, once. ``gemm`` is for 16 tokens or more, on tensor cores.
The number of outputs is an argument, so that the products of a model are few kernels.
``EPILOGUE`` is the expression as a function of the products and of two extras (`elision.codegen.triton.expression`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.dot import dot
from elision.codegen.triton.weights import halves, inputs, tile


@triton.jit
def _extra(e, token, column, inside, N, KIND: tl.constexpr):
    """An operand of the epilogue: a ``row`` for all tokens (a bias), or ``tokens`` (a residual)."""
    if KIND == "row":
        return tl.load(e + column, mask=inside, other=0.0).to(tl.float32)
    elif KIND == "tokens":
        return tl.load(e + token * N + column, mask=inside, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def gemv(
    y, x, g, w0, d0, m0, w1, d1, m1, e0, e1, eps, N,
    K: tl.constexpr, FORMAT0: tl.constexpr, FORMAT1: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, KIND0: tl.constexpr,
    KIND1: tl.constexpr, EPILOGUE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y [tokens, N]``; program (outputs / BN, token). ``BK`` codes at a time. ``FORMAT1`` "": there is one weight."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64)
    x += token * K
    first, squares = _dot(x, g, w0, d0, m0, column, N, K, FORMAT0, NORM, OFFSET, BN, BK)
    second = first
    if FORMAT1 != "":
        second, squares = _dot(x, g, w1, d1, m1, column, N, K, FORMAT1, NORM, OFFSET, BN, BK)
    if NORM:
        factor = tl.rsqrt(squares / K + eps)
        first, second = first * factor, second * factor
    inside = column < N
    value = EPILOGUE(first, second, _extra(e0, token, column, inside, N, KIND0), _extra(e1, token, column, inside, N, KIND1))
    tl.store(y + token * N + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dot(
    x, g, w, d, m, column, N, K: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One token's products ``[BN]`` with the rows ``column`` of a weight, and the sum of its squares."""
    codes: tl.constexpr = K // halves(FORMAT)
    row, wanted = column.to(tl.int64)[:, None], (column < N)[:, None]
    sums = tl.zeros([BN, BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    for start in range(0, codes, BK):
        at = start + tl.arange(0, BK)
        for half in tl.static_range(halves(FORMAT)):
            place = inputs(at, half, FORMAT)
            value = tl.load(x + place, mask=at < codes, other=0.0).to(tl.float32)
            if NORM:
                squares += value * value
                value *= tl.load(g + place, mask=at < codes, other=0.0).to(tl.float32) + OFFSET
            sums += tile(w, d, m, row, wanted, start, half, FORMAT, K, BK).to(tl.float32) * value[None, :]
    return tl.sum(sums, 1), tl.sum(squares, 0)


@triton.jit
def gemm(
    y, x, g, w0, d0, m0, w1, d1, m1, e0, e1, eps, tokens, N,
    K: tl.constexpr, FORMAT0: tl.constexpr, FORMAT1: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, KIND0: tl.constexpr,
    KIND1: tl.constexpr, EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y [tokens, N]``; program (outputs / BN, tokens / BM)."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    token = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    first, squares = _product(x, g, w0, d0, m0, token, tokens, column, N, K, FORMAT0, NORM, OFFSET, BM, BN, BK)
    second = first
    if FORMAT1 != "":
        second, squares = _product(x, g, w1, d1, m1, token, tokens, column, N, K, FORMAT1, NORM, OFFSET, BM, BN, BK)
    if NORM:
        factor = tl.rsqrt(squares / K + eps)[:, None]
        first, second = first * factor, second * factor
    inside = (token < tokens)[:, None] & (column < N)[None, :]
    value = EPILOGUE(
        first, second,
        _extra(e0, token[:, None], column[None, :], inside, N, KIND0),
        _extra(e1, token[:, None], column[None, :], inside, N, KIND1),
    )  # fmt: skip
    tl.store(y + token[:, None] * N + column[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    x, g, w, d, m, token, tokens, column, N, K: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Products ``[BM, BN]`` of some tokens with the rows ``column`` of a weight, and the tokens' sums of squares ``[BM]``."""
    codes: tl.constexpr = K // halves(FORMAT)
    row, wanted = column.to(tl.int64)[:, None], (column < N)[:, None]
    sums = tl.zeros([BM, BN], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for start in range(0, codes, BK):
        at = start + tl.arange(0, BK)
        there = (token < tokens)[:, None] & (at < codes)[None, :]
        for half in tl.static_range(halves(FORMAT)):
            place = inputs(at, half, FORMAT)
            value = tl.load(x + token[:, None] * K + place[None, :], mask=there, other=0.0)
            if NORM:
                wide = value.to(tl.float32)
                squares += tl.sum(wide * wide, 1)
                gain = tl.load(g + place, mask=at < codes, other=0.0).to(tl.float32) + OFFSET
                value = (wide * gain[None, :]).to(value.dtype)
            weight = tile(w, d, m, row, wanted, start, half, FORMAT, K, BK).to(value.dtype)
            sums += dot(value, tl.trans(weight))
    return sums, squares
