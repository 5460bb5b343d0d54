"""Ops that choose tokens of a prompt: what its last tokens look at, and the best of all."""

from __future__ import annotations

from typing import Any

import torch

from elision.ir.mask import Mask
from elision.ir.nodes import counts_of
from elision.ir.op import Cost, Sizes, need, op, token_axis
from elision.ir.tokens import Tokens
from elision.ir.types import Tensor


def _received_type(
    q: Tensor, k: Tensor, *extra: Tensor, mask: Any, scale: Any, softcap: Any = None, extras: tuple[str, ...] = (), last: int = 1
) -> Tensor:
    axis = token_axis(q, k)
    need(len(q.axes) == len(k.axes) == 3 and q.axes[2] == k.axes[2], f"expected queries and keys [t, heads, dim], got {q}, {k}")
    heads, keys = q.axes[1], k.axes[1]
    need(isinstance(heads, int) and isinstance(keys, int) and heads % keys == 0, f"{heads} query heads over {keys} key heads")
    need(len(extra) == len(extras) and set(extras) <= {"sinks", "slopes"}, f"extras {extras} for {len(extra)} operands")
    need(last >= 1, f"last={last}; expected at least 1")
    return Tensor((axis,), q.dtype)


def _received_cost(sizes: Sizes, types: list[Any], result: Tensor, attrs: dict[str, Any]) -> Cost:
    q, k = types[:2]
    flops = 2.0 * attrs.get("last", 1) * sizes.of(q.axes[0]) * q.width
    return Cost(flops, {1: float(sizes.bytes(k))}, float(sizes.bytes(result)))


@op(_received_type, cost=_received_cost)
def received(
    q: torch.Tensor,
    k: torch.Tensor,
    *extra: torch.Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    extras: tuple[str, ...] = (),
    last: int = 1,
    at: Tokens,
) -> torch.Tensor:
    """How much attention each token gets from the ``last`` tokens of its sequence in this call, ``[t]``: the probabilities of
    `attend` over the tokens of the call, their mean over queries and heads (FastV, Chen et al. 2024, for last=1)."""
    group, wide = q.shape[1] // k.shape[1], torch.float64 if q.dtype == torch.float64 else torch.float32
    named, score, begin = dict(zip(extras, extra, strict=True)), q.new_zeros(len(at)), 0
    for n in counts_of(at)[1].tolist():
        end = begin + n
        first = max(begin, end - last)
        x, keys = q[first:end].to(wide) * scale, k[begin:end].to(wide).repeat_interleave(group, 1)
        s = torch.einsum("mhd,nhd->hmn", x, keys)
        if softcap is not None:
            s = torch.tanh(s / softcap) * softcap
        q_pos, k_pos = at.pos[first:end, None], at.pos[None, begin:end]
        if "slopes" in named:
            s = s + named["slopes"].to(wide)[:, None, None] * (k_pos - q_pos)
        s = s.masked_fill(~mask.visible(q_pos, k_pos), -torch.inf)
        if "sinks" in named:
            s = torch.cat((s, named["sinks"].to(wide)[:, None, None].expand(-1, s.shape[1], 1)), -1)
        if n:
            score[begin:end] = s.softmax(-1)[..., :n].mean((0, 1)).to(q.dtype)
        begin = end
    return score


def _foremost_type(score: Tensor, *, keep: float, first: int = 1, last: int = 1) -> Tensor:
    need(len(score.axes) == 1 and 0 < keep <= 1, f"expected a score [t] and 0 < keep <= 1; got {score}, {keep}")
    need(first >= 1 and last >= 1, f"first={first}, last={last}; expected at least 1: the share is of what lies between them")
    return Tensor((token_axis(score),), "bool")


@op(_foremost_type)
def foremost(score: torch.Tensor, *, keep: float, first: int = 1, last: int = 1, at: Tokens) -> torch.Tensor:
    """Which tokens of every sequence stay: the ``first`` and ``last`` ones, then those with the largest scores, ties to the
    earlier one. ``keep``: of the positions from its first token to its last (so that it means the same where tokens have been
    left out before), rounded up."""
    rank, counts = counts_of(at)
    starts = counts.cumsum(0) - counts
    ends = (starts + counts - 1).clamp(min=0)
    span = at.pos[ends] - at.pos[starts.clamp(max=max(len(at) - 1, 0))] + 1
    want = (keep * span.double() - 1e-9).ceil().long().clamp(min=first + last)
    protect = (rank < first) | (rank >= counts[at.row] - last)
    order = torch.where(protect, torch.inf, score.double()).argsort(descending=True, stable=True)
    order = order[at.row[order].argsort(stable=True)]  # by sequence, best first
    standing = torch.empty_like(order)
    standing[order] = torch.arange(len(order)) - starts[at.row[order]]
    return standing < want[at.row]
