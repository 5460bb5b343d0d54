"""What entries received of attention: the column sums of its probabilities, from the logits and the saved log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import keys, rows_of
from elision.codegen.triton.noise import cold, shaken, stream
from elision.codegen.triton.queries import load, places
from elision.codegen.triton.seen import logits, sees


@triton.jit
def key_scores(
    score, q, q_stride, pos, start, ahead, lse, slopes, k, k_scale, k_low, entry_pos, length, blocks, entries, wide,
    scale, softcap, size, first_seen, decay, last, norm, seed, amplitude, tau,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LISTS: tl.constexpr,
    FORM_K: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, PENDING: tl.constexpr,
    ADD: tl.constexpr, NOISY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``score f32[sequences, H, wide]``; program (tile of entries, sequence * H + cache head). Only keys are read. ``NOISY``: by
    the softmax of `noise`, whose sums are in ``norm``.

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
    k_head, scales, lows = rows_of(k, k_scale, k_low, place, blocks * 16, 0, D, FORM_K)
    key = keys(k_head, scales, lows, slot, inside, D, DP, FORM_K, TYPE)
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
        s -= tl.load(lse + token * (H * G) + head, mask=there, other=0.0)[:, None]
        if NOISY:
            s = shaken(s, stream(seed, head, q_pos)[:, None], k_pos[None, :], 1.0 / tau, amplitude)
            s -= tl.load(norm + token * (H * G) + head, mask=there, other=0.0)[:, None]
        share = tl.where(seen, tl.exp(s), 0.0)
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
    norm, pos, entry_pos, prompt, seed, amplitude, tau, tau_end, steps,
    H: tl.constexpr, G: tl.constexpr, LISTS: tl.constexpr, PENDING: tl.constexpr, ADD: tl.constexpr, NOISY: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """``score f32[sequences, H, wide]`` of logits ``kept f32[tokens, H G, entries]`` that decoding left: no key is read again.
    ``ADD``: to the scores that there are, times ``decay``; a sequence has one token at the most. Program (tile of entries,
    sequence * H + cache head)."""
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    list_ = row * LISTS + h % LISTS
    old = tl.load(length + list_)
    n = old
    if PENDING:
        n += end - begin
    received = tl.zeros([BN], tl.float32)
    for token in range(begin, end):
        for g in tl.static_range(G):
            head = token * (H * G) + h * G + g
            s = tl.load(kept + head * entries + slot, mask=slot < n, other=float("-inf")) - tl.load(lse + head)
            if NOISY:
                q_pos = tl.load(pos + token)
                by = cold(q_pos, tl.load(prompt + row), tau, tau_end, steps)
                k_pos = tl.load(entry_pos + list_ * entries + slot, mask=slot < n, other=0)
                s = shaken(s, stream(seed, q_pos * 0 + h * G + g, q_pos), k_pos, by, amplitude) - tl.load(norm + head)
            received += tl.exp(s)
    score += (row * H + h).to(tl.int64) * wide + slot
    if ADD:
        if end > begin:
            tl.store(score, tl.load(score, mask=slot < old, other=0.0) * decay + received, mask=slot < entries)
    else:
        tl.store(score, received, mask=slot < entries)
