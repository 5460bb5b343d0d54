"""Tiles of weights in registers, decoded from what lies in memory.

On a GPU a weight ``[N, K]`` is three planes (`elision.ir.planes`): the codes of its rows (with the bits above nibbles and the
scales of runs behind them), the fp16 scales, the fp16 minima. ``FORMAT`` says how they are read: "float", or numbers by name
(`PlaneForm.text`), so that one template serves all formats of groups of codes:

    w = (d * s) * (q - offset) + m       s: 1, or the run's signed byte (scales=16)
    w = (d * s) * q - (m * t)            s, t: six bits of the run (scales=12)

A row of nibbles is read a nibble at a time: `half` 0 gives the weights of the low, 1 of the high nibbles, and `inputs` says which
inputs of the product these are. Other formats have one half. What weights share is read once for those that lie side by side:
a tile is ``[N, runs, codes of a run]`` until it is whole.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def number(FORMAT, name):
    """A number of a format, 0 if it does not name it."""
    found = [word.partition("=")[2] for word in FORMAT.split() if word.partition("=")[0] == name]
    return int(found[0]) if found and found[0] else 0


@triton.constexpr_function
def halves(FORMAT):
    """Codes of a byte."""
    return 2 if "bits=4" in FORMAT.split() else 1


@triton.constexpr_function
def row_bytes(FORMAT, K):
    """Bytes of a row of codes, and how many of them come before its scales."""
    codes = K * (number(FORMAT, "bits") + number(FORMAT, "high")) // 8
    return codes + K // number(FORMAT, "block") * number(FORMAT, "scales"), codes


@triton.constexpr_function
def together(FORMAT, BK):
    """Bytes side by side whose weights (of one half) share a scale, a power of two."""
    run, half = number(FORMAT, "run"), number(FORMAT, "half") or BK
    return min(run & -run, half & -half, BK)


@triton.jit
def inputs(at, HALF: tl.constexpr, FORMAT: tl.constexpr):
    """The input of the product that each code belongs to; ``at``: which code it is, of a nibble which byte."""
    SIDE: tl.constexpr = number(FORMAT, "half")
    if SIDE == 0:
        return at
    else:
        return at // SIDE * (2 * SIDE) + at % SIDE + HALF * SIDE


@triton.jit
def tile(w, d, m, row, there, start, HALF: tl.constexpr, FORMAT: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Weights ``[N, BK]`` of the rows ``row [N, 1]`` at the codes from ``start`` on, float32 (of float weights: their own type);
    0 where a row is not ``there [N, 1]``, or has ended."""
    if FORMAT == "float":
        at = start + tl.arange(0, BK)[None, :]
        return tl.load(w + row * K + at, mask=there & (at < K), other=0.0)
    else:
        RUN: tl.constexpr = together(FORMAT, BK)
        first = start + tl.arange(0, BK // RUN) * RUN
        at = first[:, None] + tl.arange(0, RUN)[None, :]
        inside = there & (first < K // halves(FORMAT))[None, :]
        scale, low = _scale(w, d, m, row, inputs(first, HALF, FORMAT)[None, :], inside, FORMAT, K)
        code = _codes(w, row[:, :, None], at[None, :, :], inside[:, :, None], HALF, FORMAT, K)
        return tl.reshape(code.to(tl.float32) * scale[:, :, None] + low[:, :, None], (row.shape[0], BK))


@triton.jit
def _scale(w, d, m, row, column, inside, FORMAT: tl.constexpr, K: tl.constexpr):
    """Scales and minima ``[N, runs]`` of the weights ``column [1, runs]`` of some rows."""
    BLOCK: tl.constexpr = number(FORMAT, "block")
    RUN: tl.constexpr = number(FORMAT, "run")
    SCALES: tl.constexpr = number(FORMAT, "scales")
    ROW: tl.constexpr = row_bytes(FORMAT, K)[0]
    CODES: tl.constexpr = row_bytes(FORMAT, K)[1]
    block = row * (K // BLOCK) + column // BLOCK
    scale = tl.load(d + block, mask=inside, other=0.0).to(tl.float32)
    low = tl.zeros_like(scale)
    if number(FORMAT, "minimum") == 1:
        low = tl.load(m + block, mask=inside, other=0.0).to(tl.float32)
    if SCALES > 0:
        run, place = column // RUN % (BLOCK // RUN), w + row * ROW + CODES + column // BLOCK * SCALES
        both = tl.load(place + run, mask=inside, other=0)
        if SCALES == 16:
            scale *= both.to(tl.int8, bitcast=True).to(tl.float32)
        else:
            both = both.to(tl.int32)
            above = tl.load(place + 8 + run // 2, mask=inside, other=0).to(tl.int32) >> (run % 2 * 4)
            scale *= ((both & 15) | (above & 3) << 4).to(tl.float32)
            low *= -(both >> 4 | (above & 12) << 2).to(tl.float32)
    return scale, low


@triton.jit
def _codes(w, row, at, inside, HALF: tl.constexpr, FORMAT: tl.constexpr, K: tl.constexpr):
    """Codes of the bytes ``at [1, runs, n]`` of the rows ``row [N, 1, 1]``, less their offset."""
    if halves(FORMAT) == 1:
        return tl.load(w + row * K + at, mask=inside, other=0)
    else:
        ROW: tl.constexpr = row_bytes(FORMAT, K)[0]
        HIGH: tl.constexpr = number(FORMAT, "high")
        ORDER: tl.constexpr = number(FORMAT, "order")
        code = (tl.load(w + row * ROW + at, mask=inside, other=0).to(tl.int32) >> (4 * HALF)) & 15
        if HIGH > 0:
            column = inputs(at, HALF, FORMAT)
            EACH: tl.constexpr = 8 // HIGH * ORDER
            place = w + row * ROW + K // 2 + column // EACH * ORDER + column % ORDER
            above = tl.load(place, mask=inside, other=0).to(tl.int32) >> (column // ORDER % (8 // HIGH) * HIGH)
            code |= (above & (2**HIGH - 1)) << 4
        return code - number(FORMAT, "offset")
