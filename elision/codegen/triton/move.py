"""Entries move inside and between the memories of caches, codes unchanged: eviction, compaction, commits of drafts."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import key_place


@triton.jit
def move(
    to_k, to_v, to_k_scale, to_v_scale, to_pos, from_k, from_v, from_k_scale, from_v_scale, from_pos, source, target, n,
    to_capacity, from_capacity, to_entries, from_entries,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, LISTS: tl.constexpr,
    FROM_LISTS: tl.constexpr, SHARED: tl.constexpr,
    GROUPS_K: tl.constexpr, GROUPS_V: tl.constexpr, GP: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Slot ``source [sequences, LISTS, n]`` (``SHARED``: ``[sequences, n]``) goes to slot ``target``, likewise, where the
    source is not negative; program (i, sequence * H + cache head). No slot is read that another program writes. ``GROUPS``:
    scales of a row, 0 of floats. ``AFTER``: ``target [sequences, LISTS]`` is the slot of the first, the others follow."""
    i, row, h = tl.program_id(0).to(tl.int64), tl.program_id(1) // H, tl.program_id(1) % H
    list_ = (row * LISTS + h % LISTS).to(tl.int64)
    slot = tl.load(source + (row.to(tl.int64) if SHARED else list_) * n + i)
    if slot >= 0:
        place = tl.load(target + list_) + i if AFTER else tl.load(target + list_ * n + i)
        old, new = (row * H + h).to(tl.int64) * from_capacity, (row * H + h).to(tl.int64) * to_capacity
        channel = tl.arange(0, DP)
        key = tl.load(from_k + old * D + key_place(slot, channel, D), mask=channel < D)
        tl.store(to_k + new * D + key_place(place, channel, D), key, mask=channel < D)
        channel = tl.arange(0, DVP)
        value = tl.load(from_v + (old + slot) * DV + channel, mask=channel < DV)
        tl.store(to_v + (new + place) * DV + channel, value, mask=channel < DV)
        group = tl.arange(0, GP)
        if GROUPS_K > 0:
            scale = tl.load(from_k_scale + (old + slot) * GROUPS_K + group, mask=group < GROUPS_K)
            tl.store(to_k_scale + (new + place) * GROUPS_K + group, scale, mask=group < GROUPS_K)
        if GROUPS_V > 0:
            scale = tl.load(from_v_scale + (old + slot) * GROUPS_V + group, mask=group < GROUPS_V)
            tl.store(to_v_scale + (new + place) * GROUPS_V + group, scale, mask=group < GROUPS_V)
        if h < LISTS:
            place_of = tl.load(from_pos + (row * FROM_LISTS + h % FROM_LISTS).to(tl.int64) * from_entries + slot)
            tl.store(to_pos + list_ * to_entries + place, place_of)
