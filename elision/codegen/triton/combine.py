"""Parts of attention over disjoint entries, joined by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.queries import waiting


@triton.jit
def combine(
    out, lse, part, sinks, row, node, tokens,
    HEADS: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr, LSE: tl.constexpr,
    WAITING: tl.constexpr,
):  # fmt: skip
    """Program (token, query head); ``part f32[SPLITS, tokens, HEADS, DVP + 2]`` as `attend` leaves it, SPLITS a power of
    two; ``lse`` as there."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channel = tl.arange(0, DVP)
    split = tl.arange(0, SPLITS)
    where = part + ((split * tokens + token) * HEADS + head) * (DVP + 2)
    tops, totals = tl.load(where + DVP), tl.load(where + DVP + 1)
    top = tl.max(tops, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    fade = tl.exp(tops - base)
    total = tl.sum(totals * fade, 0)
    if SINKS:
        total += tl.exp(sink - base)
    sums = tl.sum(tl.load(where[:, None] + channel[None, :]) * fade[:, None], 0)
    found = sums / tl.where(total > 0, total, 1.0)
    tl.store(out + (token * HEADS + head) * DV + channel, found.to(out.dtype.element_ty), mask=channel < DV)
    if LSE:
        norm = tl.where(total > 0, base + tl.log(total), float("-inf"))
        if WAITING > 0:
            place = waiting(tl.load(row + token), tl.load(node + token), WAITING)
            tl.store(lse + (place * HEADS + head) * 2, norm)
        else:
            tl.store(lse + token * HEADS + head, norm)
