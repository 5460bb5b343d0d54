"""Where the rows of a cache lie (`elision.ir.layout`), and tiles of keys and values in registers.

Keys of 16 slots are ``[D, 16]``, values ``[16, D]``, so values are in the order of the slots. ``GROUP`` 0: rows of floats; else
signed bytes with a float32 scale for so many channels of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_place(slot, channel, D: tl.constexpr):
    """Where a key's channel is, in elements after the first key of its head."""
    return slot // 16 * (16 * D) + channel * 16 + slot % 16


@triton.jit
def keys(k, scale, slot, inside, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr):
    """Keys ``[DP, slots]`` of the slots ``[n]`` as ``TYPE``, 0 beyond ``D`` channels and where not ``inside``."""
    channel = tl.arange(0, DP)[:, None]
    there = inside[None, :] if DP == D else inside[None, :] & (channel < D)
    found = tl.load(k + key_place(slot[None, :], channel, D), mask=there, other=0)
    if GROUP > 0:
        groups: tl.constexpr = D // GROUP
        if groups == 1:
            factor = tl.load(scale + slot, mask=inside, other=0.0)[None, :]
        else:
            factor = tl.load(scale + slot[None, :] * groups + channel // GROUP, mask=there, other=0.0)
        return (found.to(tl.float32) * factor).to(TYPE)
    else:
        return found.to(TYPE)


@triton.jit
def values(v, scale, slot, inside, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr, TYPE: tl.constexpr):
    """Values ``[slots, DP]``, as `keys`."""
    channel = tl.arange(0, DP)[None, :]
    there = inside[:, None] if DP == D else inside[:, None] & (channel < D)
    found = tl.load(v + slot[:, None] * D + channel, mask=there, other=0)
    if GROUP > 0:
        groups: tl.constexpr = D // GROUP
        if groups == 1:
            factor = tl.load(scale + slot, mask=inside, other=0.0)[:, None]
        else:
            factor = tl.load(scale + slot[:, None] * groups + channel // GROUP, mask=there, other=0.0)
        return (found.to(tl.float32) * factor).to(TYPE)
    else:
        return found.to(TYPE)
