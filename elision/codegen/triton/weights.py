"""Tiles of weights in registers, decoded from what lies in memory.

On a GPU a weight ``[N, K]`` is three planes, so that reads of codes are aligned and side by side (`elision.ir.planes`): the codes
of its rows in the order in which they are stored, then the fp16 scales ``[N, K / G]``, then the fp16 minima. ``FORMAT``:

    float      codes are the weights, of any float type
    int8       w = d * q        signed bytes
    nibbles    w = d * (q - 8)  G / 2 bytes a group, the codes of its first half in the low nibbles (Q4_0)
    nibbles+m  w = d * q + m    likewise (Q4_1, int4)

A row of nibbles is read a nibble at a time: `half` 0 gives the weights of the low, 1 of the high nibbles, and `inputs` says which
inputs of the product these are. Other formats have one half.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inputs(at, HALF: tl.constexpr, FORMAT: tl.constexpr, G: tl.constexpr):
    """The input of the product that each code belongs to; ``at``: which code it is, of a nibble which byte."""
    if FORMAT == "float" or FORMAT == "int8":
        return at
    else:
        return at // (G // 2) * G + at % (G // 2) + HALF * (G // 2)


@triton.jit
def tile(w, d, m, row, at, inside, HALF: tl.constexpr, FORMAT: tl.constexpr, G: tl.constexpr, K: tl.constexpr):
    """Weights of the rows ``row [N, 1]`` at the codes ``at [1, n]``, float32 (of float weights: their own type); 0 where not
    ``inside [N, n]``."""
    if FORMAT == "float":
        return tl.load(w + row * K + at, mask=inside, other=0.0)
    else:
        column = inputs(at, HALF, FORMAT, G)
        scale = tl.load(d + row * (K // G) + column // G, mask=inside, other=0.0).to(tl.float32)
        if FORMAT == "int8":
            return tl.load(w + row * K + at, mask=inside, other=0).to(tl.float32) * scale
        else:
            code = (tl.load(w + row * (K // 2) + at, mask=inside, other=0).to(tl.int32) >> (4 * HALF)) & 15
            if FORMAT == "nibbles":
                return (code - 8).to(tl.float32) * scale
            else:
                low = tl.load(m + row * (K // G) + column // G, mask=inside, other=0.0).to(tl.float32)
                return code.to(tl.float32) * scale + low
