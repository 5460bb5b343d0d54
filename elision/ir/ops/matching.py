"""Ops that say which tokens of a sequence others join. What they give, `clusters` makes an axis of."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from elision.ir.nodes import counts_of
from elision.ir.op import Cost, Sizes, need, op, token_axis
from elision.ir.tokens import Tokens
from elision.ir.types import Tensor


def _match_type(k: Tensor, *, n: int = 0, share: float = 0.0, protect: int = 1, heads: bool = False) -> Tensor:
    axis = token_axis(k)
    need(len(k.axes) == 3, f"expected keys [t, heads, dim], got {k}")
    need(n >= 0 and 0 <= share < 1 and protect >= 0, f"n={n}, share={share}, protect={protect}")
    return Tensor((axis,), "i64")


def _match_cost(sizes: Sizes, types: list[Tensor], result: Tensor, attrs: dict[str, object]) -> Cost:
    k = types[0]
    tokens, dim = sizes.of(k.axes[0]), sizes.of(k.axes[2])
    return Cost(0.5 * tokens * tokens / sizes.rows * dim, {0: float(sizes.bytes(k))}, float(sizes.bytes(result)))


@op(_match_type, cost=_match_cost)
def match(
    k: torch.Tensor, *, n: int = 0, share: float = 0.0, protect: int = 1, heads: bool = False, at: Tokens
) -> torch.Tensor:
    """Bipartite soft matching (ToMe, Bolya et al. 2022): the token that each token joins, itself for most.

    Of every sequence, tokens of even rank (A) look for the most similar one of odd rank (B), by the cosine of the keys
    ``[t, heads, dim]``, averaged over heads (``heads``: by the mean over heads of their cosines). The ``n`` most similar pairs
    (or a ``share`` of the sequence's tokens, rounded down) are merged, at most as many as A has; the first ``protect`` tokens
    join none.
    """
    metric = F.normalize(k.float(), dim=-1).flatten(1) if heads else F.normalize(k.float().mean(1), dim=-1)
    assign, free, start = torch.arange(len(at)), -(-protect // 2), 0
    for length in counts_of(at)[1].tolist():
        keys = metric[start : start + length]
        most = min(n or int(length * share), (length + 1) // 2 - free)
        if length > 1 and most > 0:
            best, to = (keys[::2] @ keys[1::2].T).max(-1)
            chosen = free + best[free:].argsort(descending=True, stable=True)[:most]
            assign[start + 2 * chosen] = start + 2 * to[chosen] + 1
        start += length
    return assign


def _regard_type(q: Tensor, k: Tensor, *weights: Tensor, scale: float) -> Tensor:
    axis = token_axis(q, k, *weights)
    need(len(q.axes) == len(k.axes) == 3 and q.axes[2] == k.axes[2], f"expected queries and keys [t, heads, dim], got {q}, {k}")
    heads, keys = q.axes[1], k.axes[1]
    need(isinstance(heads, int) and isinstance(keys, int) and heads % keys == 0, f"{heads} query heads over {keys} key heads")
    need(len(weights) <= 1, "expected at most one size for each token")
    return Tensor((axis,), q.dtype)


@op(_regard_type)
def regard(q: torch.Tensor, k: torch.Tensor, *size: torch.Tensor, scale: float, at: Tokens) -> torch.Tensor:
    """How much of its attention each sequence's first token gives to each token, the mean over heads: ``[t]``, summing to 1 over
    a sequence (but for a least share, so that it can be divided by). ``size [t]``: of tokens that stand for several."""
    group = q.shape[1] // k.shape[1]
    rank, _ = counts_of(at)
    queries = q.new_zeros(at.rows, *q.shape[1:])
    queries[at.row[rank == 0]] = q[rank == 0]
    logits = (queries[at.row].float() * k.float().repeat_interleave(group, 1)).sum(-1) * scale
    if size:
        logits = logits + size[0].float().log()[:, None]
    place = at.row[:, None].expand_as(logits)
    top = logits.new_full((at.rows, logits.shape[1]), -torch.inf).scatter_reduce_(0, place, logits, "amax")
    weight = (logits - top[at.row]).exp()
    total = weight.new_zeros(top.shape).index_add_(0, at.row, weight)
    return (weight / total[at.row]).mean(-1).to(q.dtype).clamp(min=torch.finfo(q.dtype).tiny ** 0.5)


def _fuse_type(score: Tensor, *, keep: float, protect: int = 1) -> Tensor:
    need(len(score.axes) == 1 and 0 < keep <= 1 and protect >= 0, f"expected a score [t], 0 < keep <= 1; got {score}, {keep}")
    return Tensor((token_axis(score),), "i64")


@op(_fuse_type)
def fuse(score: torch.Tensor, *, keep: float, protect: int = 1, at: Tokens) -> torch.Tensor:
    """Keep the best tokens of every sequence, and let all others join the best of these: the token that each token joins.

    Of the tokens after the first ``protect``, a share ``keep``, rounded up, stays as it is; ties go to the earlier token.
    """
    rank, counts = counts_of(at)
    free = rank >= protect
    order = torch.where(free, score.double(), torch.inf).argsort(descending=True, stable=True)
    order = order[at.row[order].argsort(stable=True)]  # by sequence, best first
    start = counts.cumsum(0) - counts
    standing = torch.empty_like(order)
    standing[order] = torch.arange(len(order)) - start[at.row[order]]
    kept = counts.clamp(max=protect) + (keep * (counts - protect).clamp(min=0).double()).ceil().long()
    target = order[(start + kept).clamp(max=len(order) - 1)]  # of each sequence, the best that does not stay
    return torch.where(standing < kept[at.row], torch.arange(len(at)), target[at.row])
