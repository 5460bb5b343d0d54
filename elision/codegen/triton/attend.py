"""Attention over a cache, for prompts and for decoding: flash attention (Dao et al. 2022) of some queries over a part of the
entries.

A program has ``BM`` rows, ``BM / GP`` tokens of one sequence times the query heads of one cache head, so keys and values are
read once for the group. ``splits`` programs share the entries of a sequence (flash decoding); their parts meet in `combine`.
Older entries may lie in a segment of their own, in another form; each program has a share of both. Drafted tokens also see nodes
in Scratch, by their ancestor bits, in the last split. Positions decide what is seen, never places.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import keys, rows_of, values
from elision.codegen.triton.dot import dot
from elision.codegen.triton.pages import closed
from elision.codegen.triton.queries import load, places, waiting
from elision.codegen.triton.seen import logits, sees


@triton.jit
def attend(
    out, lse, part, kept, kept_nodes, kept_stride, q, q_stride, pos, anc, node, start, slopes, sinks,
    k, v, k_scale, v_scale, k_low, v_low, entry_pos, length, blocks, entries,
    older_k, older_v, older_k_scale, older_v_scale, older_k_low, older_v_low, older, older_blocks, older_groups,
    draft_k, draft_v, draft_k_scale, draft_v_scale, draft_k_low, draft_v_low, node_pos, node_live, tokens, splits,
    scale, softcap, size, first_seen, ring, ring_sinks, pages,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    LISTS: tl.constexpr, FORM_K: tl.constexpr, FORM_V: tl.constexpr, OLDER_K: tl.constexpr, OLDER_V: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    DRAFTED: tl.constexpr, PENDING: tl.constexpr, ORDERED: tl.constexpr, NODES: tl.constexpr, PARTS: tl.constexpr,
    LSE: tl.constexpr, KEPT: tl.constexpr, WAITING: tl.constexpr, LISTED: tl.constexpr, PAGE: tl.constexpr, OPEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (split, tile of tokens, sequence * H + cache head).

    ``out [tokens, H G, DV]``, ``lse [tokens, H G]`` if ``LSE`` (of drafts that wait: two numbers apart); if ``PARTS``, ``part
    f32[splits, tokens, H G, DVP + 2]`` instead: sums, then the largest logit and the sum of the weights. ``kept f32[tokens, H G,
    kept_stride]`` if ``KEPT``: the logits, for scores; ``WAITING`` places a sequence, by ``node``, take those of drafts in the
    place of the tokens, and ``kept_nodes`` their logits of nodes. ``PENDING``: the tokens of the call are appended but not
    counted in ``length [sequences, LISTS]``.
    ``ORDERED``: entry i is at position i. ``RING``: entries are seen for ``ring`` positions only. ``LISTED``: of the entries
    before the last multiple of ``OPEN``, a token sees those of ``pages i64[tokens, H, LISTED]`` alone; one token a program
    (``GP = BM``). ``older [sequences, LISTS]``: how many entries are in the segment before, in forms ``OLDER``.
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
        entry_pos += list_ * entries
        if KEPT:
            line = (waiting(row, tl.load(node + token, mask=there, other=0), WAITING) if WAITING > 0 else token) * (H * G) + head

        before = tl.zeros([], tl.int64)
        if older is not None:
            before = tl.load(older + list_)
            low, high = _span(before, before * 0, q_pos, there, size, first_seen, MASK, ORDERED, BN)
            share = tl.cdiv(tl.cdiv(high - low, splits), BN) * BN
            begin = low + split * share
            end = tl.minimum(begin + share, high)
            slots = older_blocks * 16
            k_head, k_sizes, k_least = rows_of(older_k, older_k_scale, older_k_low, place, slots, older_groups, D, OLDER_K)
            v_head, v_sizes, v_least = rows_of(older_v, older_v_scale, older_v_low, place, slots, older_groups, DV, OLDER_V)
            for at in range(begin, end, BN):
                slot = at + tl.arange(0, BN)
                inside = slot < end
                k_pos = tl.load(entry_pos + slot, mask=inside, other=0)
                key = keys(k_head, k_sizes, k_least, slot, inside, D, DP, OLDER_K, TYPE)
                s = logits(query, key, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
                seen = inside[None, :] & there[:, None] & sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
                s = tl.where(seen, s, float("-inf"))
                value = values(v_head, v_sizes, v_least, slot, inside, DV, DVP, OLDER_V, TYPE)
                top, total, sums = _joined(top, total, sums, s, value)

        n = tl.load(length + list_)
        if PENDING:
            n += count
        low, high = _span(n, before, q_pos, there, size, first_seen, MASK, ORDERED and not KEPT, BN)
        if LISTED > 0:
            own = (tl.load(start + row) + first).to(tl.int64)
            until = closed(length, start, row, tl.load(pos + own), OPEN, PENDING)
            listed = pages + (own * H + h) * LISTED
            high = n * 0 + LISTED * PAGE + OPEN
        share = tl.cdiv(tl.cdiv(high - low, splits), BN) * BN
        begin = low + split * share
        end = tl.minimum(begin + share, high)
        k_head, k_sizes, k_least = rows_of(k, k_scale, k_low, place, blocks * 16, 0, D, FORM_K)
        v_head, v_sizes, v_least = rows_of(v, v_scale, v_low, place, blocks * 16, 0, DV, FORM_V)
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
                k_pos = tl.load(entry_pos + before + slot, mask=inside, other=0)
            key = keys(k_head, k_sizes, k_least, slot, inside, D, DP, FORM_K, TYPE)
            s = logits(query, key, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
            seen = inside[None, :] & there[:, None] & sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
            if RING:
                seen &= (k_pos < ring_sinks)[None, :] | (q_pos[:, None] - k_pos[None, :] < ring)
            s = tl.where(seen, s, float("-inf"))
            if KEPT:
                where = kept + line[:, None] * kept_stride + slot[None, :]
                tl.store(where, s, mask=inside[None, :] & there[:, None])
            value = values(v_head, v_sizes, v_least, slot, inside, DV, DVP, FORM_V, TYPE)
            top, total, sums = _joined(top, total, sums, s, value)
        if DRAFTED:
            if split == splits - 1:
                bits = tl.load(anc + token, mask=there, other=0)
                k_head, k_sizes, k_least = rows_of(draft_k, draft_k_scale, draft_k_low, place, NODES, 0, D, FORM_K)
                v_head, v_sizes, v_least = rows_of(draft_v, draft_v_scale, draft_v_low, place, NODES, 0, DV, FORM_V)
                for begun in tl.range(0, NODES, BN if BN < NODES else NODES, num_stages=1):
                    other = begun + tl.arange(0, BN if BN < NODES else NODES)
                    live = tl.load(node_live + row * NODES + other) != 0
                    k_pos = tl.load(node_pos + row * NODES + other)
                    key = keys(k_head, k_sizes, k_least, other, live, D, DP, FORM_K, TYPE)
                    s = logits(query, key, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
                    seen = live[None, :] & ((bits[:, None] >> other[None, :].to(tl.int64)) & 1 != 0)
                    seen &= sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
                    if RING:
                        seen &= (k_pos < ring_sinks)[None, :] | (q_pos[:, None] - k_pos[None, :] < ring)
                    s = tl.where(seen, s, float("-inf"))
                    if WAITING > 0:
                        tl.store(kept_nodes + line[:, None] * NODES + other[None, :], s, mask=there[:, None])
                    value = values(v_head, v_sizes, v_least, other, live, DV, DVP, FORM_V, TYPE)
                    top, total, sums = _joined(top, total, sums, s, value)

        channel = tl.arange(0, DVP)
        if not PARTS:
            if SINKS:
                top, total, sums = _with_sink(top, total, sums, tl.load(sinks + head, mask=there, other=0.0).to(tl.float32))
            where = (token * (H * G) + head)[:, None] * DV + channel[None, :]
            found = sums / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(out + where, found.to(out.dtype.element_ty), mask=there[:, None] & (channel < DV)[None, :])
            if LSE:
                norm = top + tl.log(total)
                if WAITING > 0:
                    tl.store(lse + line * 2, norm, mask=there)
                else:
                    tl.store(lse + token * (H * G) + head, norm, mask=there)
        else:
            where = part + ((split * tokens + token) * (H * G) + head) * (DVP + 2)
            tl.store(where[:, None] + channel[None, :], sums, mask=there[:, None])
            tl.store(where + DVP, top, mask=there)
            tl.store(where + DVP + 1, total, mask=there)


@triton.jit
def _span(n, before, q_pos, there, size, first_seen, MASK: tl.constexpr, ORDERED: tl.constexpr, BN: tl.constexpr):
    """The first and the last of ``n`` slots, behind ``before`` entries, that some query may see."""
    low, high = n * 0, n
    if ORDERED and MASK != "full":
        high = tl.minimum(high, tl.maximum(tl.max(q_pos) + 1 - before, 0))
    if ORDERED and MASK == "window":
        if first_seen == 0:
            low = tl.maximum(tl.min(tl.where(there, q_pos, tl.max(q_pos))) - size + 1 - before, 0) // BN * BN
    return low, tl.maximum(high, low)


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
