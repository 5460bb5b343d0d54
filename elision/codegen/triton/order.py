"""Floats as integers in the same order."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST, MOST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def key(x):
    """The key of a float32, int32."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
