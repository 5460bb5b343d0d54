"""A noisy softmax (`elision.ir.gumbel`), and what its weights sum to: of a prompt from its keys, of later tokens from the logits
that attention left."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.cache import keys, rows_of
from elision.codegen.triton.queries import load, places, waiting
from elision.codegen.triton.seen import logits, sees
from elision.ir import gumbel

GOLDEN = tl.constexpr(gumbel.GOLDEN)
SHIFT, AGAIN, LAST = (tl.constexpr(n) for n in gumbel.SHIFTS)
FACTOR, OTHER = (tl.constexpr(n) for n in gumbel.FACTORS)


@triton.jit
def mixed(x):
    """32 well mixed bits for 32 bits."""
    x = (x ^ (x >> SHIFT)) * FACTOR
    x = (x ^ (x >> AGAIN)) * OTHER
    return x ^ (x >> LAST)


@triton.jit
def stream(seed, head, q_pos):
    """What is the same for all keys of a query."""
    return mixed(mixed(seed.to(tl.uint32) + GOLDEN * (head + 1).to(tl.uint32)) + q_pos.to(tl.uint32))


@triton.jit
def cold(q_pos, prompt, tau, tau_end, steps):
    """1 / temperature of queries after prompts of so many tokens."""
    share = tl.minimum(tl.maximum((q_pos - prompt + 1).to(tl.float32) / steps, 0.0), 1.0)
    return 1.0 / (tau + (tau_end - tau) * share)


@triton.jit
def shaken(x, key, k_pos, cold, amplitude):
    """Logits, relative to their log-sum-exp, with noise and temperature."""
    bits = mixed(key ^ (k_pos.to(tl.uint32) * GOLDEN))
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return (x - tl.log(-tl.log(uniform)) * amplitude) * cold


@triton.jit
def noisy_keys(
    norm, prompt, q, q_stride, pos, start, lse, slopes, k, k_scale, k_low, entry_pos, length, blocks, entries, scale, softcap,
    size, first_seen, seed, amplitude, tau,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LISTS: tl.constexpr,
    FORM_K: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, PENDING: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``norm f32[tokens, H G]``: the log of the sum of the weights of a prompt's queries; ``prompt i64[sequences]``: its tokens.
    Program (tile of tokens, sequence * H + cache head)."""
    TYPE: tl.constexpr = q.dtype.element_ty
    row, h = tl.program_id(1) // H, tl.program_id(1) % H
    first = tl.program_id(0) * (BM // GP)
    end = tl.load(start + row + 1)
    count = end - tl.load(start + row)
    if first < count:
        token, g, there = places(start, row, first, G, GP, BM)
        head = h * G + g
        query = load(q, token, head, there, q_stride, D, DP)
        q_pos = tl.load(pos + token, mask=there, other=-1)
        slope = tl.load(slopes + head, mask=there, other=0.0).to(tl.float32)[:, None] if SLOPES else 0.0
        base = tl.load(lse + token * (H * G) + head, mask=there, other=0.0)
        key = stream(seed, head, q_pos)
        place, list_ = (row * H + h).to(tl.int64), (row * LISTS + h % LISTS).to(tl.int64)
        n = tl.load(length + list_)
        if PENDING:
            n += count
        k_head, scales, lows = rows_of(k, k_scale, k_low, place, blocks * 16, 0, D, FORM_K)
        total = tl.zeros([BM], tl.float32)
        for at in range(0, n, BN):
            slot = at + tl.arange(0, BN)
            inside = slot < n
            k_pos = tl.load(entry_pos + list_ * entries + slot, mask=inside, other=0)
            tile = keys(k_head, scales, lows, slot, inside, D, DP, FORM_K, TYPE)
            s = logits(query, tile, q_pos[:, None], k_pos[None, :], scale, softcap, slope, SOFTCAP, SLOPES)
            seen = inside[None, :] & there[:, None] & sees(q_pos[:, None], k_pos[None, :], MASK, size, first_seen)
            x = shaken(s - base[:, None], key[:, None], k_pos[None, :], 1.0 / tau, amplitude)
            total += tl.sum(tl.where(seen, tl.exp(x), 0.0), 1)
        tl.store(norm + token * (H * G) + head, tl.log(total), mask=there)
        if (first == 0) & (h == 0):
            tl.store(prompt + row, tl.load(pos + end - 1) + 1)


@triton.jit
def noisy_kept(
    norm, kept, lse, row, pos, entry_pos, length, entries, prompt, seed, amplitude, tau, tau_end, steps,
    H: tl.constexpr, G: tl.constexpr, LISTS: tl.constexpr, PENDING: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same of tokens after the prompt, one of a sequence, from ``kept f32[tokens, H G, entries]``; program (token, query
    head)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, q_pos = tl.load(row + token), tl.load(pos + token)
    list_ = b * LISTS + head // G % LISTS
    n = tl.load(length + list_)
    if PENDING:
        n += 1
    line = token * (H * G) + head
    by = cold(q_pos, tl.load(prompt + b), tau, tau_end, steps)
    key = stream(seed, head, q_pos)
    total = _sum(kept + line * entries, tl.load(lse + line), entry_pos + list_ * entries, n, key, by, amplitude, BN)
    tl.store(norm + line, tl.log(total))


@triton.jit
def noisy_waiting(
    kept, kept_nodes, lse, path, accepted, entry_pos, node_pos, length, entries, wide, prompt, seed, amplitude, tau, tau_end,
    steps,
    H: tl.constexpr, G: tl.constexpr, LISTS: tl.constexpr, DEPTH: tl.constexpr, NODES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The same of drafts that were accepted, by ``path``, from what waits; it goes beside their log-sum-exp. Program (rank in the
    path, sequence * H G + query head)."""
    i, b, head = tl.program_id(0), (tl.program_id(1) // (H * G)).to(tl.int64), tl.program_id(1) % (H * G)
    if i < tl.load(accepted + b):
        node = tl.load(path + b * NODES + i)
        q_pos = tl.load(node_pos + b * NODES + node)
        list_ = b * LISTS + head // G % LISTS
        line = waiting(b, node, DEPTH) * (H * G) + head
        base = tl.load(lse + line * 2)
        by = cold(q_pos, tl.load(prompt + b), tau, tau_end, steps)
        key = stream(seed, head, q_pos)
        total = _sum(kept + line * wide, base, entry_pos + list_ * entries, tl.load(length + list_), key, by, amplitude, BN)
        total += _sum(kept_nodes + line * NODES, base, node_pos + b * NODES, NODES, key, by, amplitude, NODES)
        tl.store(lse + line * 2 + 1, tl.log(total))


@triton.jit
def _sum(kept, base, k_pos, n, key, cold, amplitude, BN: tl.constexpr):
    total = tl.zeros([BN], tl.float32)
    for at in range(0, n, BN):
        slot = at + tl.arange(0, BN)
        s = tl.load(kept + slot, mask=slot < n, other=float("-inf"))
        total += tl.exp(shaken(s - base, key, tl.load(k_pos + slot, mask=slot < n, other=0), cold, amplitude))
    return tl.sum(total, 0)
