"""Whole blocks of a cache's tail are encoded at the end of the segment before, on the clock (`elision.ir.evict.flush`), and what
stays in the tail moves up. Lengths change last, when all have read them."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import key_place, keys, rows_of, values
from elision.codegen.triton.encode import packed, quantised
from elision.codegen.triton.forms import beside, group_of, per_byte


@triton.jit
def leaving(start, length, row, keep, BLOCK: tl.constexpr):
    """How many rows of a sequence move: whole blocks beyond the last ``keep``, if it is in the call."""
    due = tl.load(start + row + 1) > tl.load(start + row)
    return tl.maximum(tl.load(length + row) - keep, 0) // BLOCK * BLOCK * due.to(tl.int64)


@triton.jit
def flush(
    older_k, older_v, older_k_scale, older_v_scale, older_k_low, older_v_low, k, v, start, length, older, keep,
    blocks, older_blocks, older_groups,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, OLDER_K: tl.constexpr,
    OLDER_V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (group of rows, sequence * H + cache head). Keys in ``OLDER_K``, groups of rows of a channel; values in
    ``OLDER_V``, groups of channels of a row. The tail has floats."""
    ROWS: tl.constexpr = group_of(OLDER_K)
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    first = tl.program_id(0) * ROWS
    if first < leaving(start, length, row, keep, BLOCK):
        place = (row * H + h).to(tl.int64)
        end = tl.load(older + row)
        slot, all_of_them = tl.arange(0, ROWS), tl.arange(0, ROWS) >= 0
        x = keys(k + place * blocks * 16 * D, None, None, first + slot, all_of_them, D, DP, "", tl.float32)
        code, size, low = quantised(x, all_of_them[None, :], OLDER_K)
        PER: tl.constexpr = per_byte(OLDER_K)
        codes, sizes, lows = rows_of(
            older_k, older_k_scale, older_k_low, place, older_blocks * 16, older_groups, D, OLDER_K
        )
        byte = packed(code, DP // PER, ROWS, OLDER_K) if PER > 1 else code
        element, channel = tl.arange(0, DP // PER)[:, None], tl.arange(0, DP)
        at = codes + key_place((end + first + slot)[None, :], element, D // PER)
        tl.store(at, byte.to(older_k.dtype.element_ty), mask=element < D // PER)
        at = (end + first) // ROWS * D + channel
        tl.store(sizes + at, size, mask=channel < D)
        tl.store(lows + at, low, mask=channel < D)

        x = values(v + place * blocks * 16 * DV, None, None, first + slot, all_of_them, DV, DVP, "", tl.float32)
        each: tl.constexpr = DVP if DV == group_of(OLDER_V) else group_of(OLDER_V)
        shape: tl.constexpr = [ROWS * (DVP // each), each]
        there = tl.broadcast_to(tl.arange(0, DVP)[None, :] < DV, [ROWS, DVP])
        code, size, low = quantised(tl.reshape(x, shape), tl.reshape(there, shape), OLDER_V)
        PER_V: tl.constexpr = per_byte(OLDER_V)
        codes, sizes, lows = rows_of(
            older_v, older_v_scale, older_v_low, place, older_blocks * 16, older_groups, DV, OLDER_V
        )
        byte = packed(code, ROWS * (DVP // PER_V), 1, OLDER_V) if PER_V > 1 else code
        element, number = tl.arange(0, DVP // PER_V)[None, :], tl.arange(0, DVP // each)[None, :]
        to = (end + first + slot)[:, None]
        byte = tl.reshape(byte, [ROWS, DVP // PER_V]).to(older_v.dtype.element_ty)
        tl.store(codes + to * (DV // PER_V) + element, byte, mask=element < DV // PER_V)
        GROUPS: tl.constexpr = beside(OLDER_V, DV)
        tl.store(sizes + to * GROUPS + number, tl.reshape(size, [ROWS, DVP // each]), mask=number < GROUPS)
        tl.store(lows + to * GROUPS + number, tl.reshape(low, [ROWS, DVP // each]), mask=number < GROUPS)


@triton.jit
def move_up(
    k, v, start, length, keep, blocks,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What stays of a tail comes first; program (sequence * H + cache head). Blocks of 16 slots go one after the other, each to
    where one was that has gone already."""
    row = tl.program_id(0) // H
    gone = leaving(start, length, row, keep, BLOCK) // 16
    if gone > 0:
        place = tl.program_id(0).to(tl.int64) * blocks * 16
        key, value = tl.arange(0, 16 * DP), tl.arange(0, 16 * DVP)
        for block in range(gone, tl.cdiv(tl.load(length + row), 16)):
            here, there = k + place * D + block * (16 * D), v + place * DV + block * (16 * DV)
            one, other = tl.load(here + key, mask=key < 16 * D), tl.load(there + value, mask=value < 16 * DV)
            tl.debug_barrier()
            tl.store(here - gone * (16 * D) + key, one, mask=key < 16 * D)
            tl.store(there - gone * (16 * DV) + value, other, mask=value < 16 * DV)


@triton.jit
def flushed(length, other, older, older_other, start, rows, keep, BLOCK: tl.constexpr, BN: tl.constexpr):
    """Count what has moved; program (run of ``BN`` sequences)."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = row < rows
    due = tl.load(start + row + 1, mask=inside, other=0) > tl.load(start + row, mask=inside, other=0)
    left, done = tl.load(length + row, mask=inside, other=0), tl.load(older + row, mask=inside, other=0)
    moved = tl.maximum(left - keep, 0) // BLOCK * BLOCK
    for what in tl.static_range(2):
        tl.store((length if what == 0 else other) + row, left - moved, mask=inside & due)
        tl.store((older if what == 0 else older_other) + row, done + moved, mask=inside & due)
