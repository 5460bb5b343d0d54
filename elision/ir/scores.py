"""Scores of cache entries: the probability that each received from the queries so far, kept beside the entry.

With p[t, j] the probabilities of `attend` for token t, and d the decay: S[j] <- d S[j] + sum over the query heads of a cache
head of p[t, j], token by token (H2O, Zhang et al. 2023, for d = 1; A2SF, Jo and Shin 2024, for d < 1). An entry begins at 0 and
sees itself. `Gumbel` puts the probabilities of a noisy softmax in their place.
What drafted tokens give waits until `commit` takes them. `elision.ir.observe` counts, this file keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from elision.errors import BadInput
from elision.ir.gumbel import noisy
from elision.ir.states import Scores

if TYPE_CHECKING:
    from elision.ir.store import KVStore


def credit(store: KVStore, paths: Sequence[Sequence[int]], before: torch.Tensor) -> None:
    """The accepted nodes of each row have been appended after its ``before [B, 1 or heads]`` entries: what they gave counts
    now."""
    scores, index, heads = scores_of(store), store.index, store.type.heads
    if not scores.depth:
        return
    for b, path in enumerate(paths):
        if not path:
            continue
        if max(path) >= scores.depth:
            raise BadInput(f"commit of node {max(path)}, but {scores} keeps what nodes below its depth gave")
        nodes = torch.tensor(path)
        norm = index["waiting_norm"][b, nodes]  # [m, Hq, 2]
        logits = [index[name][b, nodes] - norm[..., :1] for name in ("waiting", "waiting_nodes")]
        if scores.gumbel is None:
            given = [x.exp() * norm[..., 1:] for x in logits]
        else:
            given = _noisy(store, b, nodes, before[b], *logits)
        old, new = (torch.unflatten(p, 1, (heads, scores.group)).sum(2) for p in given)  # [m, heads, entries or nodes]
        for h, n in enumerate(before[b].expand(heads).tolist()):
            for name, decay in scores.arrays.items():
                score = index[name][b, h, : n + len(path)]
                for i in range(len(path)):
                    score *= decay
                    score += torch.cat((old[i, h, :n], new[i, h, nodes]))


def _noisy(
    store: KVStore, b: int, nodes: torch.Tensor, before: torch.Tensor, old: torch.Tensor, new: torch.Tensor
) -> list[torch.Tensor]:
    """What the accepted nodes give by a noisy softmax to the ``before [1 or heads]`` entries and to each other, from their logits
    ``old [m, Hq, entries]`` and ``new [m, Hq, nodes]``."""
    scores, index = scores_of(store), store.index
    assert scores.gumbel is not None
    entries, hidden = store.pos.shape[2], torch.full_like(old, -torch.inf)
    there = torch.arange(old.shape[2]) < before.expand(store.type.heads).repeat_interleave(scores.group)[:, None]
    on_path = torch.zeros(len(nodes), new.shape[2], dtype=torch.bool)
    on_path[:, nodes] = torch.ones(len(nodes), len(nodes), dtype=torch.bool).tril()
    logits = torch.cat((torch.where(there, old, hidden)[..., :entries], new.masked_fill(~on_path[:, None], -torch.inf)), -1)
    at = index["node_pos"][b].long()
    old_pos = store.pos[b].expand(store.type.heads, -1).repeat_interleave(scores.group, 0).long()
    k_pos = torch.cat((old_pos, at[: new.shape[2]].expand(len(old_pos), -1)), -1)
    head = torch.arange(len(k_pos))[:, None]
    found = noisy(logits, scores.gumbel, head, at[nodes].view(-1, 1, 1), k_pos, index["prompt"][b])
    return [torch.nn.functional.pad(found[..., :entries], (0, old.shape[2] - entries)), found[..., entries:]]


def begin(store: KVStore, row: torch.Tensor, entry: torch.Tensor) -> None:
    """New entries ``[n, 1 or heads]`` of these rows have no score yet."""
    for name in store.type.scores.arrays if store.type.scores is not None else ():
        store.index[name][row[:, None], torch.arange(store.type.heads), entry] = 0.0


def scores_of(store: KVStore) -> Scores:
    if store.type.scores is None:
        raise BadInput("this cache has no scores; give it KV(scores=Scores(...))")
    return store.type.scores
