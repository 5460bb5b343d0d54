"""Attention of a call's tokens to the keys and values of the call itself, read where they were computed: the model's own
forward has no cache. Flash attention (Dao et al. 2022) over ragged sequences; positions decide what is seen."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.attend import _joined, _with_sink
from elision.codegen.triton.queries import load, places
from elision.codegen.triton.seen import logits, sees


@triton.jit
def rows_of(x, stride, token, inside, h, D: tl.constexpr, DP: tl.constexpr):
    """``[tokens, DP]`` of head ``h`` of ``x [tokens, heads, D]``, 0 where not ``inside``; ``stride``: from token to token."""
    channel = tl.arange(0, DP)[None, :]
    there = inside[:, None] if DP == D else inside[:, None] & (channel < D)
    return tl.load(x + token[:, None] * stride + h * D + channel, mask=there, other=0.0)


@triton.jit
def attend_own(
    out, q, q_stride, k, k_stride, v, v_stride, pos, start, slopes, sinks, scale, softcap, size, first_seen,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, SINKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``out [tokens, H G, DV]`` of queries ``[tokens, H G, D]``, keys ``[tokens, H, D]`` and values ``[tokens, H, DV]``; program
    (tile of tokens, sequence * H + head of keys). A tile has ``BM / GP`` tokens; positions ascend in a sequence."""
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    first = tl.program_id(0) * (BM // GP)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    if begin + first < end:
        token, g, there = places(start, row, first, G, GP, BM)
        head = h * G + g
        query = load(q, token, head, there, q_stride, D, DP)
        q_pos = tl.load(pos + token, mask=there, other=-1)
        slope = tl.load(slopes + head, mask=there, other=0.0).to(tl.float32)[:, None] if SLOPES else 0.0
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        sums = tl.zeros([BM, DVP], tl.float32)
        low = begin
        high = end
        if MASK != "full":  # who comes later is not seen, and is at a later position
            high = tl.minimum(end, begin + first + BM // GP)
        if MASK == "window":  # tokens are as far apart as their places at the least
            if first_seen == 0:
                low = begin + tl.maximum(first - size + 1, 0)
        for at in range(low, high, BN):
            entry = at + tl.arange(0, BN)
            inside = entry < high
            k_pos = tl.load(pos + entry, mask=inside, other=0)
            key = tl.trans(rows_of(k, k_stride, entry, inside, h, D, DP))
            s = logits(query, key, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
            seen = inside[None, :] & there[:, None] & sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
            s = tl.where(seen, s, float("-inf"))
            top, total, sums = _joined(top, total, sums, s, rows_of(v, v_stride, entry, inside, h, DV, DVP))
        if SINKS:
            top, total, sums = _with_sink(top, total, sums, tl.load(sinks + head, mask=there, other=0.0).to(tl.float32))
        channel = tl.arange(0, DVP)
        where = (token * (H * G) + head)[:, None] * DV + channel[None, :]
        found = sums / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + where, found.to(out.dtype.element_ty), mask=there[:, None] & (channel < DV)[None, :])
