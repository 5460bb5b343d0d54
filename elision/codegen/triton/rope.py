"""Rotary position embedding (Su et al. 2021, RoFormer) in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated(x, freq, place, factor, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, STYLE: tl.constexpr):
    """The channels ``[DP]`` of a head at ``x``, turned for the position ``place``, float32 (`elision.ir.ops.dense.rope`).
    ``R`` pairs turn (0: none), ``factor`` multiplies cosine and sine. A channel and its partner are both read, so nothing has to
    move between threads."""
    channel = tl.arange(0, DP)
    own = tl.load(x + channel, mask=channel < D, other=0.0).to(tl.float32)
    if R == 0:
        return own
    else:
        inside = channel < 2 * R
        if STYLE == "interleaved":
            pair, second = channel // 2, channel % 2
        else:
            pair, second = channel % R, channel // R
        if STYLE == "half":
            a, b = pair, pair + R
        else:
            a, b = 2 * pair, 2 * pair + 1
        first = tl.load(x + a, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(x + b, mask=inside, other=0.0).to(tl.float32)
        angle = place.to(tl.float32) * tl.load(freq + pair, mask=inside, other=0.0).to(tl.float32)
        cos, sin = tl.cos(angle) * factor, tl.sin(angle) * factor
        turned = tl.where(second == 0, first * cos - other * sin, other * cos + first * sin)
        return tl.where(inside, turned, own)


@triton.jit
def rope(
    y, x, x_stride, freq, pos, factor, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    STYLE: tl.constexpr,
):  # fmt: skip
    """``y [tokens, HEADS, D]`` of ``x`` with ``x_stride`` elements from token to token; program (token, head)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, DP)
    found = rotated(x + token * x_stride + head * D, freq, tl.load(pos + token), factor, D, DP, R, STYLE)
    tl.store(y + (token * HEADS + head) * D + channel, found.to(y.dtype.element_ty), mask=channel < D)
