"""Entries move inside and between the memories of caches, codes unchanged: eviction, compaction, commits of drafts."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import key_place


@triton.jit
def move(
    to_k, to_v, to_k_scale, to_v_scale, to_k_low, to_v_low, to_pos,
    from_k, from_v, from_k_scale, from_v_scale, from_k_low, from_v_low, from_pos, source, target, older, n,
    to_capacity, from_capacity, to_entries, from_entries,
    H: tl.constexpr, W: tl.constexpr, WV: tl.constexpr, WP: tl.constexpr, WVP: tl.constexpr, LISTS: tl.constexpr,
    FROM_LISTS: tl.constexpr, SHARED: tl.constexpr,
    GROUPS_K: tl.constexpr, GROUPS_V: tl.constexpr, GP: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """Slot ``source [sequences, LISTS, n]`` (``SHARED``: ``[sequences, n]``) goes to slot ``target``, likewise, where the
    source is not negative; program (i, sequence * H + cache head). No slot is read that another program writes. Rows have ``W``
    and ``WV`` elements, and ``GROUPS`` scales, 0 of floats. ``AFTER``: ``target [sequences, LISTS]`` is the slot of the first,
    the others follow; ``older``: how many entries a segment before this one has."""
    i, row, h = tl.program_id(0).to(tl.int64), tl.program_id(1) // H, tl.program_id(1) % H
    list_ = (row * LISTS + h % LISTS).to(tl.int64)
    slot = tl.load(source + (row.to(tl.int64) if SHARED else list_) * n + i)
    if slot >= 0:
        place = tl.load(target + list_) + i if AFTER else tl.load(target + list_ * n + i)
        old, new = (row * H + h).to(tl.int64) * from_capacity, (row * H + h).to(tl.int64) * to_capacity
        at = tl.arange(0, WP)
        key = tl.load(from_k + old * W + key_place(slot, at, W), mask=at < W)
        tl.store(to_k + new * W + key_place(place, at, W), key, mask=at < W)
        at = tl.arange(0, WVP)
        value = tl.load(from_v + (old + slot) * WV + at, mask=at < WV)
        tl.store(to_v + (new + place) * WV + at, value, mask=at < WV)
        _beside(to_k_scale, from_k_scale, new + place, old + slot, GROUPS_K, GP)
        _beside(to_v_scale, from_v_scale, new + place, old + slot, GROUPS_V, GP)
        _beside(to_k_low, from_k_low, new + place, old + slot, GROUPS_K, GP)
        _beside(to_v_low, from_v_low, new + place, old + slot, GROUPS_V, GP)
        if h < LISTS:
            place_of = tl.load(from_pos + (row * FROM_LISTS + h % FROM_LISTS).to(tl.int64) * from_entries + slot)
            entry = place if older is None else place + tl.load(older + list_)
            tl.store(to_pos + list_ * to_entries + entry, place_of)


@triton.jit
def _beside(to, source, place, slot, GROUPS: tl.constexpr, GP: tl.constexpr):
    """A row's scales or minima, if it has any."""
    if source is not None:
        group = tl.arange(0, GP)
        tl.store(to + place * GROUPS + group, tl.load(source + slot * GROUPS + group, mask=group < GROUPS), mask=group < GROUPS)
