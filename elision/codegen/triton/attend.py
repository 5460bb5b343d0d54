"""Attention over a cache, for prompts and for decoding: flash attention (Dao et al. 2022) of some queries over a part of the
entries.

A program has ``BM`` rows, ``BM / GP`` tokens of one sequence times the query heads of one cache head, so keys and values are
read once for the group. ``splits`` programs share the entries of a sequence (flash decoding); their parts meet in `combine`.
Drafted tokens also see nodes in Scratch, by their ancestor bits, in the last split. Positions decide what is seen, never places.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import keys, values
from elision.codegen.triton.dot import dot
from elision.codegen.triton.pages import closed
from elision.codegen.triton.queries import load, places
from elision.codegen.triton.seen import logits, sees


@triton.jit
def attend(
    out, lse, part, kept, q, q_stride, pos, anc, start, slopes, sinks,
    k, v, k_scale, v_scale, entry_pos, length, blocks, entries,
    draft_k, draft_v, draft_k_scale, draft_v_scale, node_pos, node_live, tokens, splits,
    scale, softcap, size, first_seen, ring, ring_sinks, pages,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    LISTS: tl.constexpr, GROUP_K: tl.constexpr, GROUP_V: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    SLOPES: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, DRAFTED: tl.constexpr, PENDING: tl.constexpr,
    ORDERED: tl.constexpr, NODES: tl.constexpr, PARTS: tl.constexpr, LSE: tl.constexpr, KEPT: tl.constexpr,
    LISTED: tl.constexpr, PAGE: tl.constexpr, OPEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (split, tile of tokens, sequence * H + cache head).

    ``out [tokens, H G, DV]``, ``lse [tokens, H G]`` if ``LSE``; if ``PARTS``, ``part f32[splits, tokens, H G, DVP + 2]`` instead:
    sums, then the largest logit and the sum of the weights. ``kept f32[tokens, H G, entries]`` if ``KEPT``: the logits, for
    scores. ``PENDING``: the tokens of the call are appended but not counted in ``length [sequences, LISTS]``. ``ORDERED``:
    entry i is at position i. ``RING``: entries are seen for ``ring`` positions only. ``LISTED``: of the entries before the last
    multiple of ``OPEN``, a token sees those of ``pages i64[tokens, H, LISTED]`` alone; one token a program (``GP = BM``).
    """
    TYPE: tl.constexpr = q.dtype.element_ty
    split = tl.program_id(0)
    row, h = tl.program_id(2) // H, tl.program_id(2) % H
    first = tl.program_id(1) * (BM // GP)
    count = tl.load(start + row + 1) - tl.load(start + row)
    if first < count:
        token, g, there = places(start, row, first, G, GP, BM)
        head = h * G + g
        query = load(q, token, head, there, q_stride, D, DP)
        q_pos = tl.load(pos + token, mask=there, other=-1)
        slope = tl.load(slopes + head, mask=there, other=0.0).to(tl.float32)[:, None] if SLOPES else 0.0
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        sums = tl.zeros([BM, DVP], tl.float32)
        place = (row * H + h).to(tl.int64)
        list_ = (row * LISTS + h % LISTS).to(tl.int64)

        n = tl.load(length + list_)
        if PENDING:
            n += count
        low = n * 0
        high = n
        if ORDERED and MASK != "full" and not KEPT:
            high = tl.minimum(high, tl.max(q_pos) + 1)
        if ORDERED and MASK == "window" and not KEPT:
            if first_seen == 0:
                low = tl.maximum(tl.min(tl.where(there, q_pos, tl.max(q_pos))) - size + 1, 0) // BN * BN
        if LISTED > 0:
            own = (tl.load(start + row) + first).to(tl.int64)
            until = closed(length, start, row, tl.load(pos + own), OPEN, PENDING)
            listed = pages + (own * H + h) * LISTED
            high = n * 0 + LISTED * PAGE + OPEN
        share = tl.cdiv(tl.cdiv(high - low, splits), BN) * BN
        begin = low + split * share
        end = tl.minimum(begin + share, high)
        k_head, v_head = k + place * blocks * 16 * D, v + place * blocks * 16 * DV
        ks_head = k_scale + place * blocks * 16 * (D // GROUP_K) if GROUP_K > 0 else k
        vs_head = v_scale + place * blocks * 16 * (DV // GROUP_V) if GROUP_V > 0 else v
        for at in range(begin, end, BN):
            slot = at + tl.arange(0, BN)
            inside = slot < end
            if LISTED > 0:
                rank = slot.to(tl.int32)
                page = tl.load(listed + tl.minimum(rank // PAGE, LISTED - 1)).to(tl.int32)
                late = (rank >= LISTED * PAGE).to(tl.int32)  # by numbers: Triton 3.6 fails to lay out such truths
                slot = (page * PAGE + rank % PAGE) * (1 - late) + (until + rank - LISTED * PAGE) * late
                inside &= (slot >= 0) & (slot < n)
                held = inside.to(tl.int32)
                slot = slot * held + held - 1
                inside = slot >= 0
            if LISTED > 0:  # entry i is at position i
                k_pos = slot
            else:
                k_pos = tl.load(entry_pos + list_ * entries + slot, mask=inside, other=0)
            key = keys(k_head, ks_head, slot, inside, D, DP, GROUP_K, TYPE)
            s = logits(query, key, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
            seen = inside[None, :] & there[:, None] & sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
            if RING:
                seen &= (k_pos < ring_sinks)[None, :] | (q_pos[:, None] - k_pos[None, :] < ring)
            s = tl.where(seen, s, float("-inf"))
            if KEPT:
                where = kept + (token * (H * G) + head)[:, None] * entries + slot[None, :]
                tl.store(where, s, mask=inside[None, :] & there[:, None])
            value = values(v_head, vs_head, slot, inside, DV, DVP, GROUP_V, TYPE)
            top, total, sums = _joined(top, total, sums, s, value)
        if DRAFTED:
            if split == splits - 1:
                node = tl.arange(0, NODES)
                bits = tl.load(anc + token, mask=there, other=0)
                live = tl.load(node_live + row * NODES + node) != 0
                k_pos = tl.load(node_pos + row * NODES + node)
                k_head, v_head = draft_k + place * NODES * D, draft_v + place * NODES * DV
                ks_head = draft_k_scale + place * NODES * (D // GROUP_K) if GROUP_K > 0 else draft_k
                vs_head = draft_v_scale + place * NODES * (DV // GROUP_V) if GROUP_V > 0 else draft_v
                key = keys(k_head, ks_head, node, live, D, DP, GROUP_K, TYPE)
                s = logits(query, key, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
                seen = live[None, :] & ((bits[:, None] >> node[None, :].to(tl.int64)) & 1 != 0)
                seen &= sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
                if RING:
                    seen &= (k_pos < ring_sinks)[None, :] | (q_pos[:, None] - k_pos[None, :] < ring)
                s = tl.where(seen, s, float("-inf"))
                value = values(v_head, vs_head, node, live, DV, DVP, GROUP_V, TYPE)
                top, total, sums = _joined(top, total, sums, s, value)

        channel = tl.arange(0, DVP)
        if not PARTS:
            if SINKS:
                top, total, sums = _with_sink(top, total, sums, tl.load(sinks + head, mask=there, other=0.0).to(tl.float32))
            where = (token * (H * G) + head)[:, None] * DV + channel[None, :]
            found = sums / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out + where, found.to(out.dtype.element_ty), mask=there[:, None] & (channel < DV)[None, :])
            if LSE:
                tl.store(lse + token * (H * G) + head, top + tl.log(total), mask=there)
        else:
            where = part + ((split * tokens + token) * (H * G) + head) * (DVP + 2)
            tl.store(where[:, None] + channel[None, :], sums, mask=there[:, None])
            tl.store(where + DVP, top, mask=there)
            tl.store(where + DVP + 1, total, mask=there)


@triton.jit
def _joined(top, total, sums, s, value):
    """The softmax so far, with more logits ``[BM, BN]`` and values ``[BN, D]``. The top of nothing is -inf."""
    new = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    fade = tl.exp(top - base)
    weight = tl.exp(s - base[:, None])
    return new, total * fade + tl.sum(weight, 1), sums * fade[:, None] + dot(weight.to(value.dtype), value)


@triton.jit
def _with_sink(top, total, sums, sink):
    """A logit that takes mass and gives nothing."""
    new = tl.maximum(top, sink)
    fade = tl.exp(top - new)
    return new, total * fade + tl.exp(sink - new), sums * fade[:, None]
