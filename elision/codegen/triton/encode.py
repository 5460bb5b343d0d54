"""Rows become codes (`elision.ir.encoding`): rounded to nearest, ties to even, by the largest magnitude of a group or by its
smallest and largest number."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.forms import bits_of, has_low, per_byte, signed


@triton.jit
def quantised(x, there, FORM: tl.constexpr):
    """Of groups ``x [.., n]``, of which only what is ``there`` counts: the codes as they are stored, int32, then their scales and
    minima ``[..]`` (0, if they have none)."""
    LIMIT: tl.constexpr = 2 ** (bits_of(FORM) - 1) - 1
    LEAST: tl.constexpr = 0 if has_low(FORM) else -LIMIT
    MOST: tl.constexpr = 2 * LIMIT + 1 if has_low(FORM) else LIMIT
    if has_low(FORM):
        low = tl.min(tl.where(there, x, float("inf")), -1)
        size = (tl.max(tl.where(there, x, float("-inf")), -1) - low) / (MOST * 1.0)
    else:
        size = tl.max(tl.where(there, tl.abs(x), 0.0), -1) / (MOST * 1.0)
        low = tl.zeros_like(size)
    found = (x - tl.expand_dims(low, -1)) / tl.expand_dims(tl.where(size > 0, size, 1.0), -1)
    code = tl.minimum(tl.maximum(_nearest(found), LEAST * 1.0), MOST * 1.0).to(tl.int32)
    if not has_low(FORM) and not signed(FORM):
        code += LIMIT + 1
    return code, size, low


@triton.jit
def packed(code, X: tl.constexpr, Y: tl.constexpr, FORM: tl.constexpr):
    """Bytes ``[X, Y]`` of codes ``[X, codes of a byte, Y]``, the first in the lowest bits."""
    PER: tl.constexpr = per_byte(FORM)
    parts = tl.reshape(code, [X, PER, Y]) << (tl.arange(0, PER) * bits_of(FORM))[None, :, None]
    return tl.sum(parts, 1)


@triton.jit
def _nearest(x):
    """Of magnitudes below 2^22: adding 1.5 * 2^23 leaves no bits behind the point."""
    return (x + 12582912.0) - 12582912.0
