"""The tokens of images: patches, and tokens that come before them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def patches(
    y, x, IMAGE_H: tl.constexpr, IMAGE_W: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BK: tl.constexpr
):
    """``y [patches, C H W]`` of images ``x [images, C, IMAGE_H, IMAGE_W]``, row by row without overlap; program (patch of an
    image, image, run of ``BK`` numbers)."""
    across: tl.constexpr = IMAGE_W // W
    patch, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BK + tl.arange(0, BK)
    channel, line, column = at // (H * W), at // W % H + patch // across * H, at % W + patch % across * W
    found = tl.load(x + (image * C + channel) * (IMAGE_H * IMAGE_W) + line * IMAGE_W + column, mask=at < C * H * W)
    tl.store(y + (image * (IMAGE_H // H * across) + patch) * (C * H * W) + at, found, mask=at < C * H * W)


@triton.jit
def prepend(y, x, first, index, N: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """``y [tokens, K]``: the tokens of ``x`` at ``index``, or where that is negative those of ``first [N, K]``, -1 the last;
    program (token, run of ``BK`` channels)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BK + tl.arange(0, BK)
    place = tl.load(index + token)
    if place >= 0:
        tl.store(y + token * K + at, tl.load(x + place * K + at, mask=at < K), mask=at < K)
    else:
        tl.store(y + token * K + at, tl.load(first + (place + N) * K + at, mask=at < K), mask=at < K)
