"""Scores of drafted tokens: what those that are accepted gave, from the logits that attention left in the cache
(`elision.ir.scores.credit`), counted before they are."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.noise import cold, shaken, stream
from elision.codegen.triton.queries import waiting


@triton.jit
def credit(
    score, kept, kept_nodes, lse, path, accepted, entry_pos, node_pos, length, entries, wide, decay,
    prompt, seed, amplitude, tau, tau_end, steps,
    H: tl.constexpr, G: tl.constexpr, LISTS: tl.constexpr, DEPTH: tl.constexpr, NODES: tl.constexpr, NOISY: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """``score f32[sequences, H, wide]``; program (tile of entries, sequence * H + cache head). ``kept f32[sequences, DEPTH, H G,
    wide]``, ``kept_nodes [.., NODES]`` and ``lse [.., 2]`` as `attend` and `noise` leave them; ``path [sequences, NODES]``."""
    row, h = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    count = tl.load(accepted + row)
    list_ = row * LISTS + h % LISTS
    n = tl.load(length + list_)
    if count > 0:
        old, new = slot < n, (slot >= n) & (slot < n + count)
        own = tl.load(path + row * NODES + slot - n, mask=new, other=0)
        k_pos = tl.load(entry_pos + list_ * entries + slot, mask=old, other=0)
        k_pos = tl.where(new, tl.load(node_pos + row * NODES + own, mask=new, other=0), k_pos)
        where = score + (row * H + h) * wide + slot
        found = tl.load(where, mask=old, other=0.0)  # new entries have no score yet
        for i in range(0, count):
            node = tl.load(path + row * NODES + i)
            found *= decay
            for g in tl.static_range(G):
                line = waiting(row, node, DEPTH) * (H * G) + h * G + g
                x = tl.load(kept + line * wide + slot, mask=old, other=float("-inf"))
                x = tl.where(new, tl.load(kept_nodes + line * NODES + own, mask=new, other=float("-inf")), x)
                x -= tl.load(lse + line * 2)
                if NOISY:
                    q_pos = tl.load(node_pos + row * NODES + node)
                    by = cold(q_pos, tl.load(prompt + row), tau, tau_end, steps)
                    x = shaken(x, stream(seed, (n * 0 + h * G + g), q_pos), k_pos, by, amplitude) - tl.load(lse + line * 2 + 1)
                found += tl.exp(x)
        tl.store(where, found, mask=old | new)
