"""What attention gives to the entries of a cache, counted into their scores (`elision.ir.scores`)."""

from __future__ import annotations

import torch

from elision.errors import BadInput
from elision.ir.attend import Weighed, weigh
from elision.ir.gumbel import noisy
from elision.ir.mask import Mask
from elision.ir.nodes import counts_of, nodes_of
from elision.ir.scores import scores_of
from elision.ir.states import Gumbel, Scores
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens


def observe(
    q: torch.Tensor,
    store: KVStore,
    tokens: Tokens,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    last: int = 0,
    decoding: bool = False,
) -> None:
    """Count what the queries ``q [n, Hq, D]`` give to every entry. ``last``: only queries among the last so many tokens of the
    prompt count. ``decoding``: they come after it. Drafted ones wait for `commit`, by node."""
    found = weigh(q, store, tokens, mask, scale, softcap, sinks, slopes)
    scores = scores_of(store)
    if tokens.drafted:
        _wait(store, scores, tokens, found)
        return
    n = found.entries
    rank, counts = counts_of(tokens)
    later = counts[tokens.row] - 1 - rank
    share = found.weight / found.share
    if scores.gumbel is not None:
        share = _noisy(store, scores.gumbel, tokens, found, decoding)
    for name, decay in scores.arrays.items():
        weight = torch.full_like(later, decay, dtype=found.weight.dtype) ** later
        if last:
            ahead = later if tokens.ahead is None else tokens.ahead
            weight = weight * (ahead < last)
        rows = torch.zeros(found.top.shape[0] * found.top.shape[3], dtype=weight.dtype).index_copy(0, found.place, weight)
        received = share[..., :n] * rows.view(-1, 1, 1, found.top.shape[3], 1)
        score = store.index[name]
        if decay != 1:
            score *= (decay**counts)[:, None, None]
        score[..., :n] += received.sum((2, 3))


def _noisy(store: KVStore, gumbel: Gumbel, tokens: Tokens, found: Weighed, decoding: bool) -> torch.Tensor:
    """What parts of a prompt, or tokens after it, give by the noisy softmax, as `Weighed.weight`."""
    b, heads, group, width, _ = found.weight.shape
    if not decoding:
        store.index["prompt"].scatter_reduce_(0, tokens.row, tokens.pos + 1, "amax")
    q_pos = torch.zeros(b * width, dtype=torch.int64).index_copy(0, found.place, tokens.pos).view(b, 1, 1, width, 1)
    head = torch.arange(heads * group).view(1, heads, group, 1, 1)
    k_pos = store.pos[:, :, None, None, : found.entries].long()
    prompt = store.index["prompt"].view(b, 1, 1, 1, 1) if decoding else q_pos + 1
    return noisy(found.weight.log(), gumbel, head, q_pos, k_pos, prompt)


def _wait(store: KVStore, scores: Scores, tokens: Tokens, found: Weighed) -> None:
    node = nodes_of(tokens)
    if len(tokens) and int(node.max()) >= scores.depth:
        raise BadInput(f"drafted node {int(node.max())}, but {scores} observes nodes below its depth")
    rank, _ = counts_of(tokens)
    logits = found.weight.log().flatten(1, 2)[tokens.row, :, rank]  # [n, Hq, entries + nodes]
    share = found.share.flatten(1, 2)[tokens.row, :, rank]
    index, n, nodes = store.index, found.entries, logits.shape[-1] - found.entries
    index["waiting"][tokens.row, node, :, :n] = logits[..., :n].float()
    index["waiting_nodes"][tokens.row, node, :, :nodes] = logits[..., n : n + nodes].float()
    index["waiting_norm"][tokens.row, node] = torch.cat((torch.zeros_like(share), 1 / share), -1).float()
