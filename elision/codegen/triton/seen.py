"""Which entries queries see (`elision.ir.mask`), by positions, and what they give to them before the softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.dot import dot


@triton.jit
def sees(q_pos, k_pos, MASK: tl.constexpr, size, sinks):
    """Whether the query at ``q_pos`` sees a key at ``k_pos``, by a mask of a ``size`` that always shows the first ``sinks``."""
    if MASK == "full":
        return (k_pos >= 0) | (q_pos >= 0)
    elif MASK == "causal":
        return k_pos <= q_pos
    elif MASK == "window":
        return (k_pos <= q_pos) & ((q_pos - k_pos < size) | (k_pos < sinks))
    else:
        return (k_pos <= q_pos) & (q_pos // size == k_pos // size)


@triton.jit
def logits(q, k, q_pos, k_pos, scale, softcap, slope, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr):
    """``[BM, BN]`` of queries ``[BM, D]`` and keys ``[D, BN]``: scaled, capped (Gemma 2), with ALiBi's distance (Press et
    al.)."""
    s = dot(q, k) * scale
    if SOFTCAP:
        small = tl.exp(-2 * tl.abs(s / softcap))
        size = softcap * (1 - small) / (1 + small)
        s = tl.where(s < 0, -size, size)
    if SLOPES:
        s += slope * (k_pos - q_pos).to(tl.float32)
    return s
