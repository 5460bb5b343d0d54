"""The functions of `elision.ir.expr`, on float32 in registers. Names that Triton or Python has too end in an underscore."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_(x):
    return tl.exp(x)


@triton.jit
def log_(x):
    return tl.log(x)


@triton.jit
def log1p(x):
    return tl.log(1 + x)


@triton.jit
def sqrt_(x):
    return tl.sqrt(x)


@triton.jit
def rsqrt_(x):
    return tl.rsqrt(x)


@triton.jit
def tanh(x):
    """By exponentials of what is not positive, which cannot overflow."""
    small = tl.exp(-2 * tl.abs(x))
    size = (1 - small) / (1 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def erf_(x):
    return tl.erf(x)


@triton.jit
def sin_(x):
    return tl.sin(x)


@triton.jit
def cos_(x):
    return tl.cos(x)


@triton.jit
def abs_(x):
    return tl.abs(x)


@triton.jit
def floor_(x):
    return tl.floor(x)


@triton.jit
def sigmoid_(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0)


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def minimum_(a, b):
    return tl.minimum(a, b)


@triton.jit
def maximum_(a, b):
    return tl.maximum(a, b)


@triton.jit
def where_(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def power(x, y: tl.constexpr):
    """Small whole powers by products; others by logarithm, of what is positive."""
    if y == 2:
        return x * x
    elif y == 3:
        return x * x * x
    else:
        return tl.exp(y * tl.log(x))


@triton.jit
def remainder(x, y):
    """With the sign of y, as in Python."""
    return x - y * tl.floor(x / y)
