"""Ops that rank the tokens of an encoder by its attention graph and leave out the unimportant and the redundant."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from elision.ir.nodes import counts_of
from elision.ir.op import Cost, Sizes, need, op, token_axis
from elision.ir.tokens import Tokens
from elision.ir.types import Tensor

SETTLED = 1e-3  # a round that moves no score by more than this share of the mean is the last
SPREAD = (0.01, 0.7)  # variance, over tokens, of the scores (of mean 1) that a head may have


def _pagerank_type(q: Tensor, k: Tensor, *, scale: float, rounds: int) -> Tensor:
    axis = token_axis(q, k)
    need(len(q.axes) == len(k.axes) == 3 and q.axes[2] == k.axes[2], f"expected queries and keys [t, heads, dim], got {q}, {k}")
    heads, keys = q.axes[1], k.axes[1]
    need(isinstance(heads, int) and isinstance(keys, int) and heads % keys == 0, f"{heads} query heads over {keys} key heads")
    need(rounds >= 1, f"rounds={rounds}; expected at least 1")
    return Tensor((axis,), q.dtype)


def _pagerank_cost(sizes: Sizes, types: list[Any], result: Tensor, attrs: dict[str, Any]) -> Cost:
    q, k = types[:2]
    tokens = sizes.of(q.axes[0])
    each = tokens / sizes.rows
    flops = 2.0 * tokens * each * (q.width + sizes.of(q.axes[1]) * attrs.get("rounds", 1))
    return Cost(flops, {0: float(sizes.bytes(q)), 1: float(sizes.bytes(k))}, float(sizes.bytes(result)))


@op(_pagerank_type, cost=_pagerank_cost)
def pagerank(q: torch.Tensor, k: torch.Tensor, *, scale: float, rounds: int, at: Tokens) -> torch.Tensor:
    """The importance of every token in the attention graph of its sequence, ``[t]`` (Zero-TPrune, Wang et al. 2023).

    By head, s <- A^T s from s = 1/n, where A are the attention probabilities, for up to ``rounds`` rounds (fewer where it settles
    before). Of scores of mean 1, heads whose variance over tokens is not between 0.01 and 0.7 are left out (unless all are), and
    the others give the root of their mean square.
    """
    group, score, begin = q.shape[1] // k.shape[1], q.new_zeros(len(at)), 0
    for n in filter(None, counts_of(at)[1].tolist()):  # a sequence may have no tokens
        x, keys = q[begin : begin + n].float(), k[begin : begin + n].float().repeat_interleave(group, 1)
        a = ((x * scale).transpose(0, 1) @ keys.permute(1, 2, 0)).softmax(-1)  # [heads, n, n]
        s = a.mean(1)[:, None]  # the first round
        for _ in range(rounds - 1):
            s, before = s @ a, s
            if float((s - before).abs().max()) * n < SETTLED:
                break
        s = s[:, 0] * n
        spread = s.var(-1, correction=0)
        kept = (spread >= SPREAD[0]) & (spread <= SPREAD[1])
        found = s[kept] if bool(kept.any()) else s
        score[begin : begin + n] = found.square().mean(0).sqrt().to(q.dtype)
        begin += n
    return score


def _prune_type(score: Tensor, k: Tensor, *, keep: float, similar: float = 0.0, protect: int = 1) -> Tensor:
    axis = token_axis(score, k)
    need(len(score.axes) == 1 and len(k.axes) == 3, f"expected a score [t] and keys [t, heads, dim], got {score}, {k}")
    need(0 < keep <= 1 and 0 <= similar <= 1 and protect >= 0, f"keep={keep}, similar={similar}, protect={protect}")
    return Tensor((axis,), "i64")


@op(_prune_type)
def prune(
    score: torch.Tensor, k: torch.Tensor, *, keep: float, similar: float = 0.0, protect: int = 1, at: Tokens
) -> torch.Tensor:
    """Leave out tokens in two stages; the token that stands for each: itself for those that stay, else the most similar of these.

    Of the tokens of a sequence after the first ``protect``, a share ``keep``, rounded up, stays. Of the others, the part
    ``similar``, rounded down, goes for being similar and the rest, first, for a small score (ties: the later one). For
    similarity the remaining ones, by score, are halved; of the less important half those go whose most similar token of the
    other half is most similar, by the cosine of the keys of all heads (Zero-TPrune, Wang et al. 2023).
    """
    metric, assign, begin = F.normalize(F.normalize(k.float(), dim=-1).flatten(1), dim=-1), torch.arange(len(at)), 0
    for n in counts_of(at)[1].tolist():
        free = n - min(n, protect)
        left = math.ceil(keep * free - 1e-9)
        twins = min(int(similar * (free - left)), left)
        keys = metric[begin : begin + n]
        order = score[begin + n - free : begin + n].double().argsort(descending=True, stable=True) + n - free
        order = order[: left + twins]
        better, worse = order[: -(-len(order) // 2)], order[-(-len(order) // 2) :]
        stays = torch.zeros(n, dtype=torch.bool)
        stays[: n - free] = True
        stays[order] = True
        if twins:
            most = (keys[worse] @ keys[better].T).amax(-1)
            stays[worse[most.argsort(descending=True, stable=True)[:twins]]] = False
        here, gone = stays.nonzero().flatten(), (~stays).nonzero().flatten()
        if len(gone):
            assign[begin + gone] = begin + here[(keys[gone] @ keys[here].T).argmax(-1)]
        begin += n
    return assign
