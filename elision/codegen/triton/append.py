"""Keys and values join a cache: keys are turned to their positions, both are encoded, on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import key_place
from elision.codegen.triton.rope import rotated


@triton.jit
def append(
    k_rows, k_stride, v_rows, v_stride, freq, row, pos, node, start, factor,
    k, v, k_scale, v_scale, entry_pos, node_pos, node_live, length, written, blocks, entries, sinks, turns,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, LISTS: tl.constexpr,
    GROUP_K: tl.constexpr, GROUP_V: tl.constexpr, R: tl.constexpr, STYLE: tl.constexpr, DRAFTED: tl.constexpr,
    RING: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Program (token, cache head). Committed tokens go behind the entries of their sequence, which `advance` counts later;
    ``RING``: to the slots of the ``turns`` after the first ``sinks``, by ``written``, the tokens that ever came. ``DRAFTED`` ones
    go to Scratch (``k`` and ``v`` are its arrays) by ``node``."""
    token, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b = tl.load(row + token)
    place = tl.load(pos + token)
    list_ = b * LISTS + h % LISTS
    stays = place >= 0
    if DRAFTED:
        slot = tl.load(node + token)
        capacity = NODES
        if h == 0:
            tl.store(node_pos + b * NODES + slot, place.to(tl.int32))
            tl.store(node_live + b * NODES + slot, 1)
    else:
        capacity = blocks * 16
        slot, stays = place_of(token, b, list_, start, length, written, sinks, turns, stays, RING)
        if h < LISTS:
            tl.store(entry_pos + list_ * entries + slot, place.to(tl.int32), mask=stays)
    head = b * H + h
    channel = tl.arange(0, DP)
    key = rotated(k_rows + token * k_stride + h * D, freq, place, factor, D, DP, R, STYLE)
    key = key.to(k_rows.dtype.element_ty).to(tl.float32)
    where = k + head * capacity * D + key_place(slot, channel, D)
    _store(where, k_scale + (head * capacity + slot) * (D // GROUP_K) if GROUP_K > 0 else k, key, stays, D, DP, GROUP_K)
    channel = tl.arange(0, DVP)
    value = tl.load(v_rows + token * v_stride + h * DV + channel, mask=channel < DV, other=0.0).to(tl.float32)
    where = v + (head * capacity + slot) * DV + channel
    _store(where, v_scale + (head * capacity + slot) * (DV // GROUP_V) if GROUP_V > 0 else v, value, stays, DV, DVP, GROUP_V)


@triton.jit
def _store(where, scale, x, stays, D: tl.constexpr, DP: tl.constexpr, GROUP: tl.constexpr):
    """Encode the row ``x [DP]``: rounded to nearest, ties to even, by the largest magnitude of each group
    (`elision.ir.encoding`)."""
    inside = (tl.arange(0, DP) < D) & stays
    if GROUP > 0:
        each: tl.constexpr = triton.next_power_of_2(GROUP) if D == GROUP else GROUP
        size = tl.max(tl.abs(tl.reshape(x, [DP // each, each])), 1) / 127.0
        number = tl.arange(0, DP // each)
        tl.store(scale + number, size, mask=(number < D // GROUP) & stays)
        wide = tl.reshape(tl.broadcast_to(tl.where(size > 0, size, 1.0)[:, None], [DP // each, each]), [DP])
        tl.store(where, _nearest(x / wide).to(tl.int8), mask=inside)
    else:
        tl.store(where, x.to(where.dtype.element_ty), mask=inside)


@triton.jit
def _nearest(x):
    """Of magnitudes below 2^22: adding 1.5 * 2^23 leaves no bits behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def place_of(token, b, list_, start, length, written, sinks, turns, inside, RING: tl.constexpr):
    """The slots of committed tokens, and whether they stay: of those ``inside``, and of what comes to a ring the last."""
    begin = tl.load(start + b)
    rank = token - begin
    if RING:
        number = tl.load(written + b) + rank
        last = (number < sinks) | (rank >= tl.load(start + b + 1) - begin - turns)
        return tl.where(number < sinks, number, sinks + (number - sinks) % turns), inside & last
    else:
        return tl.load(length + list_) + rank, inside


@triton.jit
def advance(
    length, other, written, start, rows, slots, LISTS: tl.constexpr, RING: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the committed tokens of a call, of which sequence b has ``start[b] .. start[b + 1]`` (or, if ``COUNTS``,
    ``start[b]``), in both lengths of its lists; program (run of ``BLOCK`` lists)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = at // LISTS
    inside = at < rows * LISTS
    count = tl.load(start + b, mask=inside, other=0)
    if not COUNTS:
        count = tl.load(start + b + 1, mask=inside, other=0) - count
    if RING:
        ever = tl.load(written + b, mask=inside, other=0) + count
        new = tl.minimum(ever, slots)
        tl.store(written + b, ever, mask=inside)
    else:
        new = tl.load(length + at, mask=inside, other=0) + count
    tl.store(length + at, new, mask=inside)
    tl.store(other + at, new, mask=inside)
