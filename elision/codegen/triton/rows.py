"""What looks at one token at a time: norms, rows of tables, expressions."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.weights import halves, inputs, tile


@triton.jit
def norm(
    y, x, x_stride, g, b, eps, OUTER: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr,
    GAIN: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``y [tokens, OUTER, D]``, the last axis normalised (`elision.ir.ops.dense.norm`); program (token, outer). ``GAIN``: 0 none,
    1 ``g [D]``, 2 ``g [OUTER, D]``; ``EARLY``: rounded to the type of x before the gain."""
    token, outer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, DP)
    inside = channel < D
    value = tl.load(x + token * x_stride + outer * D + channel, mask=inside, other=0.0).to(tl.float32)
    if KIND == "layer":
        value = tl.where(inside, value - tl.sum(value, 0) / D, 0.0)
    squares = tl.sum(value * value, 0)
    value *= tl.rsqrt(squares + eps if KIND == "l2" else squares / D + eps)
    if EARLY:
        value = value.to(x.dtype.element_ty).to(tl.float32)
    if GAIN > 0:
        value *= tl.load(g + (outer * D if GAIN == 2 else 0) + channel, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if BIAS:
        value += tl.load(b + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + (token * OUTER + outer) * D + channel, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def embed(y, ids, w, d, m, K: tl.constexpr, FORMAT: tl.constexpr, BK: tl.constexpr):
    """``y [tokens, K]``: the rows of a table at ``ids``; program (token, run of ``BK`` codes)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(ids + token).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    start = tl.program_id(1) * BK
    at = start + tl.arange(0, BK)[None, :]
    for half in tl.static_range(halves(FORMAT)):
        found = tile(w, d, m, row, row >= 0, start, half, FORMAT, K, BK)
        tl.store(y + token * K + inputs(at, half, FORMAT), found.to(y.dtype.element_ty), mask=at < K // halves(FORMAT))


@triton.jit
def restrict(y, x, index, K: tl.constexpr, BK: tl.constexpr):
    """``y [chosen, K]``: the tokens at ``index``; program (chosen token, run of channels)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BK + tl.arange(0, BK)
    found = tl.load(x + tl.load(index + token) * K + at, mask=at < K, other=0.0)
    tl.store(y + token * K + at, found, mask=at < K)


@triton.jit
def concat(y, x, x_stride, place, WIDE: tl.constexpr, OUTER: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """``x [tokens, OUTER, D]`` becomes the channels from ``place`` on of ``y [tokens, OUTER, WIDE]``; program (token, outer, run
    of ``BD`` channels)."""
    token, outer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BD + tl.arange(0, BD)
    found = tl.load(x + token * x_stride + outer * D + channel, mask=channel < D, other=0.0)
    tl.store(y + (token * OUTER + outer) * WIDE + place + channel, found, mask=channel < D)


@triton.jit
def pointwise(
    y, x0, x1, x2, x3, s0, s1, s2, s3,
    OUTER: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, KIND0: tl.constexpr, KIND1: tl.constexpr,
    KIND2: tl.constexpr, KIND3: tl.constexpr, EXPR: tl.constexpr,
):  # fmt: skip
    """``y [tokens, OUTER, D] = EXPR(x0 .. x3)``; program (token, outer, run of channels). ``s``: elements from token to token,
    0 of a weight. ``KIND``: of every operand "full", "last" (the same for all outer), "one" (a number for each outer),
    "single" (a number) or ""."""
    token, outer = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(2) * BD + tl.arange(0, BD)
    a = _operand(x0, token * s0, outer, channel, D, KIND0)
    b = _operand(x1, token * s1, outer, channel, D, KIND1)
    c = _operand(x2, token * s2, outer, channel, D, KIND2)
    d = _operand(x3, token * s3, outer, channel, D, KIND3)
    value = EXPR(a, b, c, d) + tl.zeros([BD], tl.float32)
    tl.store(y + (token * OUTER + outer) * D + channel, value.to(y.dtype.element_ty), mask=channel < D)


@triton.jit
def _operand(x, token, outer, channel, D: tl.constexpr, KIND: tl.constexpr):
    if KIND == "full":
        return tl.load(x + token + outer * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    elif KIND == "last":
        return tl.load(x + token + channel, mask=channel < D, other=0.0).to(tl.float32)
    elif KIND == "one":
        return tl.load(x + token + outer).to(tl.float32)
    elif KIND == "single":
        return tl.load(x + token).to(tl.float32)
    else:
        return 0.0
