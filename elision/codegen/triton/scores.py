"""What entries received of attention: the column sums of its probabilities, from the logits and the saved log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import keys
from elision.codegen.triton.queries import load, places
from elision.codegen.triton.seen import logits, sees


@triton.jit
def key_scores(
    score, q, q_stride, pos, start, ahead, lse, slopes, k, k_scale, entry_pos, length, blocks, entries, wide,
    scale, softcap, size, first_seen, decay, last,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LISTS: tl.constexpr,
    GROUP_K: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, PENDING: tl.constexpr,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``score f32[sequences, H, wide]``; program (tile of entries, sequence * H + cache head). Only keys are read.

    Of ``ADD``, the score is first multiplied with ``decay`` for every token, and a query counts ``decay`` to the number of those
    that come after it; with ``last`` only those among the last so many of the prompt count, by ``ahead [tokens]``.
    """
    TYPE: tl.constexpr = q.dtype.element_ty
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    count = tl.load(start + row + 1) - tl.load(start + row)
    place, list_ = (row * H + h).to(tl.int64), (row * LISTS + h % LISTS).to(tl.int64)
    old = tl.load(length + list_)
    n = old
    if PENDING:
        n += count
    inside = slot < n
    k_head = k + place * blocks * 16 * D
    ks_head = k_scale + place * blocks * 16 * (D // GROUP_K) if GROUP_K > 0 else k
    key = keys(k_head, ks_head, slot, inside, D, DP, GROUP_K, TYPE)
    k_pos = tl.load(entry_pos + list_ * entries + slot, mask=inside, other=0)
    received = tl.zeros([BN], tl.float32)
    for first in range(0, count, BM // GP):
        token, g, there = places(start, row, first, G, GP, BM)
        head = h * G + g
        query = load(q, token, head, there, q_stride, D, DP)
        q_pos = tl.load(pos + token, mask=there, other=-1)
        slope = tl.load(slopes + head, mask=there, other=0.0).to(tl.float32)[:, None] if SLOPES else 0.0
        s = logits(query, key, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
        seen = inside[None, :] & there[:, None] & sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
        norm = tl.load(lse + token * (H * G) + head, mask=there, other=0.0)
        share = tl.where(seen, tl.exp(s - norm[:, None]), 0.0)
        if ADD:
            later = (count - 1 - first - tl.arange(0, BM) // GP).to(tl.float32)
            weight = tl.exp(later * tl.log(decay))
            if last > 0:
                weight = tl.where(tl.load(ahead + token, mask=there, other=0) < last, weight, 0.0)
            share *= weight[:, None]
        received += tl.sum(share, 0)
    where = score + place * wide + slot
    if ADD:
        before = tl.load(where, mask=slot < old, other=0.0)  # new entries have no score yet
        tl.store(where, before * tl.exp(count.to(tl.float32) * tl.log(decay)) + received, mask=slot < entries)
    else:
        tl.store(where, received, mask=slot < entries)


@triton.jit
def mass(
    score, kept, lse, start, length, entries, wide, decay,
    H: tl.constexpr, G: tl.constexpr, LISTS: tl.constexpr, PENDING: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``score f32[sequences, H, wide]`` of logits ``kept f32[tokens, H G, entries]`` that decoding left: no key is read again.
    ``ADD``: to the scores that there are, times ``decay``; a sequence has one token at the most. Program (tile of entries,
    sequence * H + cache head)."""
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    old = tl.load(length + row * LISTS + h % LISTS)
    n = old
    if PENDING:
        n += end - begin
    received = tl.zeros([BN], tl.float32)
    for token in range(begin, end):
        for g in tl.static_range(G):
            head = token * (H * G) + h * G + g
            s = tl.load(kept + head * entries + slot, mask=slot < n, other=float("-inf"))
            received += tl.exp(s - tl.load(lse + head))
    score += (row * H + h).to(tl.int64) * wide + slot
    if ADD:
        if end > begin:
            tl.store(score, tl.load(score, mask=slot < old, other=0.0) * decay + received, mask=slot < entries)
    else:
        tl.store(score, received, mask=slot < entries)
