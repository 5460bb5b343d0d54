"""Keys and values join a cache: keys are turned to their positions, both are encoded, on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import key_place, rows_of
from elision.codegen.triton.encode import packed, quantised
from elision.codegen.triton.forms import beside, codes, group_of, has_low, per_byte
from elision.codegen.triton.rope import rotated


@triton.jit
def append(
    k_rows, k_stride, v_rows, v_stride, freq, row, pos, node, start, factor,
    k, v, k_scale, v_scale, k_low, v_low, entry_pos, node_pos, node_live, length, older, written, blocks, entries, sinks, turns,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, LISTS: tl.constexpr,
    FORM_K: tl.constexpr, FORM_V: tl.constexpr, R: tl.constexpr, STYLE: tl.constexpr, DRAFTED: tl.constexpr,
    RING: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Program (token, cache head). Committed tokens go behind the entries of their sequence, which `advance` counts later;
    ``RING``: to the slots of the ``turns`` after the first ``sinks``, by ``written``, the tokens that ever came. ``DRAFTED`` ones
    go to Scratch (``k`` and ``v`` are its arrays) by ``node``. ``older``: how many entries a segment before this one has."""
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
            entry = slot if older is None else slot + tl.load(older + list_)
            tl.store(entry_pos + list_ * entries + entry, place.to(tl.int32), mask=stays)
    head = b * H + h
    channel = tl.arange(0, DP)
    key = rotated(k_rows + token * k_stride + h * D, freq, place, factor, D, DP, R, STYLE)
    key = key.to(k_rows.dtype.element_ty).to(tl.float32)
    where, scales, lows = rows_of(k, k_scale, k_low, head, capacity, 0, D, FORM_K)
    at = key_place(slot, tl.arange(0, DP // per_byte(FORM_K)), D // per_byte(FORM_K))
    _store(where + at, scales, lows, slot, key, stays, D, DP, FORM_K)
    channel = tl.arange(0, DVP)
    value = tl.load(v_rows + token * v_stride + h * DV + channel, mask=channel < DV, other=0.0).to(tl.float32)
    where, scales, lows = rows_of(v, v_scale, v_low, head, capacity, 0, DV, FORM_V)
    at = slot * (DV // per_byte(FORM_V)) + tl.arange(0, DVP // per_byte(FORM_V))
    _store(where + at, scales, lows, slot, value, stays, DV, DVP, FORM_V)


@triton.jit
def _store(where, scales, lows, slot, x, stays, D: tl.constexpr, DP: tl.constexpr, FORM: tl.constexpr):
    """Store the row ``x [DP]`` of a slot, encoded, to its elements ``where``."""
    if codes(FORM):
        PER: tl.constexpr = per_byte(FORM)
        each: tl.constexpr = DP if D == group_of(FORM) else group_of(FORM)
        shape: tl.constexpr = [DP // each, each]
        code, size, low = quantised(tl.reshape(x, shape), tl.reshape(tl.arange(0, DP), shape) < D, FORM)
        number = tl.arange(0, DP // each)
        at, known = slot * beside(FORM, D) + number, (number < D // group_of(FORM)) & stays
        tl.store(scales + at, size, mask=known)
        if has_low(FORM):
            tl.store(lows + at, low, mask=known)
        found = tl.reshape(packed(code, DP // PER, 1, FORM), [DP // PER]) if PER > 1 else tl.reshape(code, [DP])
        tl.store(where, found.to(where.dtype.element_ty), mask=(tl.arange(0, DP // PER) < D // PER) & stays)
    else:
        tl.store(where, x.to(where.dtype.element_ty), mask=(tl.arange(0, DP) < D) & stays)


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
