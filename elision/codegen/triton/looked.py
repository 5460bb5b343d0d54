"""What tokens receive of the attention of some of their sequence: of the last ones (FastV, Chen et al. 2024), of the first (EViT,
Liang et al. 2022), or of all, each by a weight (Zero-TPrune, Wang et al. 2023). Only queries and keys are read."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.own import rows_of
from elision.codegen.triton.queries import load, places
from elision.codegen.triton.seen import logits, sees


@triton.jit
def asked(start, row, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Where a sequence begins, its tokens, and from which to which they look: the first ``FIRST``, the last ``LAST``, or, of both
    0, all."""
    begin = tl.load(start + row)
    count = (tl.load(start + row + 1) - begin).to(tl.int32)
    low, high = count * 0, count
    if FIRST > 0:
        high = tl.minimum(count, FIRST)
    if LAST > 0:
        low = tl.maximum(count - LAST, 0)
    return begin, count, low, high


@triton.jit
def looks(
    lse, q, q_stride, k, k_stride, pos, start, slopes, sinks, sized, scale, softcap, size, first_seen,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr, SIZED: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``lse f32[tokens, H G]`` of the tokens that look; program (tile of them, sequence * H + head of keys). ``sized
    [tokens]``: of keys that stand for several tokens."""
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    begin, count, low, high = asked(start, row, FIRST, LAST)
    first = low + tl.program_id(0) * (BM // GP)
    if first < high:
        token, g, there = places(start, row, first, G, GP, BM)
        there &= token < begin + high
        head = h * G + g
        query = load(q, token, head, there, q_stride, D, DP)
        q_pos = tl.load(pos + token, mask=there, other=-1)
        slope = tl.load(slopes + head, mask=there, other=0.0).to(tl.float32)[:, None] if SLOPES else 0.0
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        for at in range(0, count, BN):
            rank = at + tl.arange(0, BN)
            s = _seen(
                query, q_pos, there, k, k_stride, pos, begin + rank, rank < count, h, slope, sized, scale, softcap, size,
                first_seen, D, DP, MASK, SOFTCAP, SLOPES, SIZED,
            )  # fmt: skip
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(s - base[:, None]), 1)
            top = new
        if SINKS:
            sink = tl.load(sinks + head, mask=there, other=0.0).to(tl.float32)
            new = tl.maximum(top, sink)
            total = total * tl.exp(top - new) + tl.exp(sink - new)
            top = new
        tl.store(lse + token * (H * G) + head, top + tl.log(tl.where(there, total, 1.0)), mask=there)


@triton.jit
def received(
    score, q, q_stride, k, k_stride, pos, start, slopes, sized, lse, weight, settled, scale, softcap, size, first_seen, least,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SIZED: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    WEIGHTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``score [tokens]``: the mean over heads and over the tokens that look, at least ``least``; program (tile of tokens,
    sequence). If ``WEIGHTED``, ``score f32[tokens, H G]`` instead: of every head the sum over tokens times ``weight f32[tokens, H
    G]``, and of a sequence that is ``settled`` (at its first token) the weights
    themselves."""
    row = tl.program_id(1)
    begin, count, low, high = asked(start, row, FIRST, LAST)
    rank = tl.program_id(0) * BN + tl.arange(0, BN)
    entry, inside = begin + rank, rank < count
    if tl.program_id(0) * BN < count:
        whole = tl.zeros([BN], tl.float32)
        still = 0
        if WEIGHTED:
            still = tl.load(settled + begin)
        for head in range(0, H * G):
            h = head // G
            total = tl.zeros([BN], tl.float32)
            for at in range(low, high, BM):
                looking = at + tl.arange(0, BM)
                token, there = begin + looking, looking < high
                query = rows_of(q, q_stride, token, there, head, D, DP)
                q_pos = tl.load(pos + token, mask=there, other=-1)
                slope = tl.load(slopes + head).to(tl.float32) if SLOPES else 0.0
                s = _seen(
                    query, q_pos, there, k, k_stride, pos, entry, inside, h, slope, sized, scale, softcap, size, first_seen,
                    D, DP, MASK, SOFTCAP, SLOPES, SIZED,
                )  # fmt: skip
                norm = tl.load(lse + token * (H * G) + head, mask=there, other=0.0)
                share = tl.exp(s - norm[:, None])
                if WEIGHTED:
                    share *= tl.load(weight + token * (H * G) + head, mask=there, other=0.0)[:, None]
                total += tl.sum(share, 0)
            if WEIGHTED:
                where = entry * (H * G) + head
                total = tl.where(still != 0, tl.load(weight + where, mask=inside, other=0.0), total)
                tl.store(score + where, total, mask=inside)
            else:
                whole += total
        if not WEIGHTED:
            mean = whole / ((high - low).to(tl.float32) * (H * G))
            tl.store(score + entry, tl.maximum(mean, least).to(score.dtype.element_ty), mask=inside)


@triton.jit
def _seen(
    query, q_pos, there, k, k_stride, pos, entry, inside, h, slope, sized, scale, softcap, size, first_seen,
    D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """The logits of what queries see of a tile of keys, -inf elsewhere."""
    k_pos = tl.load(pos + entry, mask=inside, other=0)
    key = tl.trans(rows_of(k, k_stride, entry, inside, h, D, DP))
    s = logits(query, key, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
    if SIZED:
        s += tl.log(tl.load(sized + entry, mask=inside, other=1.0).to(tl.float32))[None, :]
    seen = inside[None, :] & there[:, None] & sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
    return tl.where(seen, s, float("-inf"))
