"""Where the rows of a cache lie (`elision.ir.layout`), and tiles of keys and values in registers.

Keys of 16 slots are ``[W, 16]``, values ``[16, W]``, so values are in the order of the slots; ``W`` elements have the ``D``
channels of a row. ``FORM`` (`forms`): floats, or codes with float32 scales, and perhaps minima, for groups of channels of a row
or of rows of a channel. Codes become floats in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.forms import beside, bits_of, by_token, codes, group_of, has_low, per_byte


@triton.jit
def key_place(slot, element, W: tl.constexpr):
    """Where an element of a key is, after the first key of its head."""
    return slot // 16 * (16 * W) + element * 16 + slot % 16


@triton.jit
def rows_of(x, scale, low, head, slots, groups, D: tl.constexpr, FORM: tl.constexpr):
    """Where a head with so many slots has its keys or values, their scales and minima (anything, if there are none); ``groups``:
    of rows that share theirs."""
    x += head * slots * (D // per_byte(FORM))
    apart = head * groups * D if by_token(FORM) else head * slots * beside(FORM, D)
    return x, scale + apart if codes(FORM) else x, low + apart if has_low(FORM) else x


@triton.jit
def keys(k, scale, low, slot, inside, D: tl.constexpr, DP: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """Keys ``[DP, slots]`` of the slots ``[n]`` as ``TYPE``, 0 beyond ``D`` channels and where not ``inside``."""
    channel = tl.arange(0, DP)[:, None]
    there = inside[None, :] if DP == D else inside[None, :] & (channel < D)
    PER: tl.constexpr = per_byte(FORM)
    found = tl.load(k + key_place(slot[None, :], channel // PER, D // PER), mask=there, other=0)
    return _numbers(found, scale, low, slot, channel, inside, there, 0, D, FORM).to(TYPE)


@triton.jit
def values(v, scale, low, slot, inside, D: tl.constexpr, DP: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr):
    """Values ``[slots, DP]``, as `keys`."""
    channel = tl.arange(0, DP)[None, :]
    there = inside[:, None] if DP == D else inside[:, None] & (channel < D)
    PER: tl.constexpr = per_byte(FORM)
    found = tl.load(v + slot[:, None] * (D // PER) + channel // PER, mask=there, other=0)
    return _numbers(found, scale, low, slot, channel, inside, there, 1, D, FORM).to(TYPE)


@triton.jit
def _numbers(found, scale, low, slot, channel, inside, there, AXIS: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """What is stored as ``found`` in these slots and channels; ``AXIS``: that of the channels."""
    if not codes(FORM):
        return found
    else:
        if bits_of(FORM) < 8:
            found = (found.to(tl.int32) >> (channel % per_byte(FORM)) * bits_of(FORM)) & (2 ** bits_of(FORM) - 1)
            if not has_low(FORM):
                found -= 2 ** (bits_of(FORM) - 1)
        number = found.to(tl.float32) * _side(scale, slot, channel, inside, there, AXIS, D, FORM)
        if has_low(FORM):
            number = tl.where(there, number + _side(low, slot, channel, inside, there, AXIS, D, FORM), 0.0)
        return number


@triton.jit
def _side(x, slot, channel, inside, there, AXIS: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """The scales or minima of these slots and channels; one for a row is read once."""
    if beside(FORM, D) == 1:
        return tl.expand_dims(tl.load(x + slot, mask=inside, other=0.0), AXIS)
    elif by_token(FORM):
        return tl.load(x + tl.expand_dims(slot, AXIS) // group_of(FORM) * D + channel, mask=there, other=0.0)
    else:
        return tl.load(x + tl.expand_dims(slot, AXIS) * beside(FORM, D) + channel // group_of(FORM), mask=there, other=0.0)
