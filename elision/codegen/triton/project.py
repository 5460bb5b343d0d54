"""The projection of a layer's attention in one launch: RMS norm, products, the norm of each head, rotation; queries to a buffer,
keys and values encoded to the cache.

A program has columns of one head, of which a channel and the one that it turns with are both there (`_channels`): all of them
where a head is normalised or has scales of its own, else as few as make programs enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.append import place_of
from elision.codegen.triton.cache import key_place
from elision.codegen.triton.encode import quantised
from elision.codegen.triton.forms import beside, codes, group_of
from elision.codegen.triton.linear import _dot, _product


@triton.jit
def project(
    q, x, g, eps, wq, dq, mq, wk, dk, mk, wv, dv, mv, bq, bk, bv, gq, gk, head_eps, freq, factor, tokens,
    row, pos, node, start, k, v, k_scale, v_scale, entry_pos, node_pos, node_live, length, written, blocks, entries, sinks, turns,
    K: tl.constexpr, FORMAT: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, HEADS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, LISTS: tl.constexpr, FIRST_Q: tl.constexpr, FIRST_K: tl.constexpr, FIRST_V: tl.constexpr,
    BIAS: tl.constexpr, HEAD_NORM: tl.constexpr, HEAD_GAIN: tl.constexpr, HEAD_OFFSET: tl.constexpr, EARLY: tl.constexpr,
    R: tl.constexpr, STYLE: tl.constexpr, FORM_K: tl.constexpr, FORM_V: tl.constexpr, DRAFTED: tl.constexpr,
    RING: tl.constexpr, NODES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``q [tokens, HEADS, D]``; program (columns of the ``HEADS`` heads of queries, then of ``H`` of keys and ``H`` of values;
    tokens / BM). ``FIRST``: the row of its weight where it begins. ``HEAD_NORM``: RMS norm of each head of queries and keys,
    ``EARLY`` rounded before the gain. For caches see `elision.codegen.triton.append`."""
    TILES: tl.constexpr = triton.cdiv(D, BN)
    TYPE: tl.constexpr = q.dtype.element_ty
    head, part = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    kind = tl.where(head < HEADS, 0, tl.where(head < HEADS + H, 1, 2))
    first = _of(kind, FIRST_Q, FIRST_K - HEADS * D, FIRST_V - (HEADS + H) * D)
    channel, partner = _channels(part, D, R, STYLE, BN)
    given = channel
    if R > 0 and STYLE == "parted":
        split = tl.where(channel < R, 2 * channel, 2 * (channel - R) + 1)
        given = tl.where((channel < 2 * R) & (kind < 2), split, channel)
    there = channel < D
    column = tl.where(there, first + head * D + given, _NONE)
    token = (tl.program_id(1) * BM + tl.arange(0, BM)).to(tl.int64)
    w, d, m = _of(kind, wq, wk, wv), dq, mq
    if FORMAT != "float":
        d = _of(kind, dq, dk, dv)
    if mq is not None:
        m = _of(kind, mq, mk, mv)
    if BM == 1:
        own = x + tl.program_id(1).to(tl.int64) * K
        sums, squares = _dot(own, g, w, d, m, column, _NONE, K, FORMAT, NORM, OFFSET, BN, BK)
        value = sums[None, :]
    else:
        value, squares = _product(x, g, w, d, m, token, tokens, column, _NONE, K, FORMAT, NORM, OFFSET, BM, BN, BK)
        squares = squares[:, None]
    if NORM:
        value *= tl.rsqrt(squares / K + eps)
    if BIAS:
        value += tl.load(_of(kind, bq, bk, bv) + column, mask=there, other=0.0).to(tl.float32)[None, :]
    value = value.to(TYPE).to(tl.float32)
    if HEAD_NORM:
        whole = value * tl.rsqrt(tl.sum(value * value, 1) / D + head_eps)[:, None]
        if EARLY:
            whole = whole.to(TYPE).to(tl.float32)
        if HEAD_GAIN:
            gain = tl.load(tl.where(kind == 0, gq, gk) + given, mask=there, other=0.0).to(tl.float32)
            whole *= gain[None, :] + HEAD_OFFSET
        value = tl.where(kind < 2, whole.to(TYPE).to(tl.float32), value)
    inside = token < tokens
    place = tl.load(pos + token, mask=inside, other=0)
    if R > 0:
        turning = (channel < 2 * R) & (kind < 2)
        pair, second = channel % R, channel // R
        if STYLE == "interleaved":
            pair, second = channel // 2, channel % 2
        angle = place.to(tl.float32)[:, None] * tl.load(freq + pair, mask=turning, other=0.0).to(tl.float32)[None, :]
        other = tl.gather(value, tl.broadcast_to(partner[None, :], [BM, BN]), 1)
        sign = tl.where(second == 0, -1.0, 1.0)[None, :]
        turned = (value * tl.cos(angle) + sign * other * tl.sin(angle)) * factor
        value = tl.where(turning[None, :], turned.to(TYPE).to(tl.float32), value)
    if kind == 0:
        at = (token[:, None] * HEADS + head) * D + channel[None, :]
        tl.store(q + at, value.to(TYPE), mask=inside[:, None] & there[None, :])
    else:
        h = tl.where(kind == 1, head - HEADS, head - HEADS - H)
        b = tl.load(row + token, mask=inside, other=0)
        list_ = b * LISTS + h % LISTS
        if DRAFTED:
            slot, capacity, stays = tl.load(node + token, mask=inside, other=0), NODES, inside & (place >= 0)
        else:
            capacity = blocks * 16
            slot, stays = place_of(token, b, list_, start, length, written, sinks, turns, inside & (place >= 0), RING)
        if kind == 1:
            if part == 0:
                if DRAFTED:
                    tl.store(node_pos + b * NODES + slot, place.to(tl.int32), mask=inside & (h == 0))
                    tl.store(node_live + b * NODES + slot, 1, mask=inside & (h == 0))
                else:
                    tl.store(entry_pos + list_ * entries + slot, place.to(tl.int32), mask=stays & (h < LISTS))
            _keep(k, k_scale, (b * H + h) * capacity, slot, value, stays, channel, True, D, FORM_K, BM, BN)
        else:
            _keep(v, v_scale, (b * H + h) * capacity, slot, value, stays, channel, False, D, FORM_V, BM, BN)


#: A row that no weight has.
_NONE = tl.constexpr(1 << 30)


@triton.jit
def _of(kind, q, k, v):
    return tl.where(kind == 0, q, tl.where(kind == 1, k, v))


@triton.jit
def _channels(part, D: tl.constexpr, R: tl.constexpr, STYLE: tl.constexpr, BN: tl.constexpr):
    """The channels of a program's columns, and the column of the one that each turns with: of the whole head, or of a part of one
    that turns as a whole."""
    column = tl.arange(0, BN)
    if R == 0 or STYLE == "interleaved":
        return part * BN + column, column ^ 1
    else:
        half: tl.constexpr = R if BN >= D else BN // 2
        channel = column if BN >= D else column // half * R + part * half + column % half
        return channel, tl.where(column < half, column + half, tl.where(column < 2 * half, column - half, column))


@triton.jit
def _keep(
    to, scale, head, slot, x, stays, channel, KEYS: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Store ``x [BM, BN]`` to the slots ``[BM]`` of the heads that begin at entry ``head [BM]`` of a cache."""
    if KEYS:
        at = head[:, None] * D + key_place(slot[:, None], channel[None, :], D)
    else:
        at = (head + slot)[:, None] * D + channel[None, :]
    inside = stays[:, None] & (channel < D)[None, :]
    if codes(FORM):
        each: tl.constexpr = BN if D == group_of(FORM) else group_of(FORM)
        parts: tl.constexpr = BN // each
        there = tl.reshape(tl.broadcast_to((channel < D)[None, :], [BM, BN]), [BM, parts, each])
        code, size, _ = quantised(tl.reshape(x, [BM, parts, each]), there, FORM)
        number = tl.arange(0, parts)
        where = (head + slot)[:, None] * beside(FORM, D) + number[None, :]
        tl.store(scale + where, size, mask=stays[:, None] & (number < beside(FORM, D))[None, :])
        tl.store(to + at, tl.reshape(code, [BM, BN]).to(tl.int8), mask=inside)
    else:
        tl.store(to + at, x.to(to.dtype.element_ty), mask=inside)
