"""Token recycling: every token's latest likely successors, expanded through a fixed tree."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from elision.ir.drafting.drafter import Drafter, register
from elision.ir.drafting.proposal import Array, Proposal
from elision.ir.drafting.rates import Rates

_FALL = (0.45, 0.16, 0.09, 0.06, 0.04, 0.03, 0.025, 0.02)  # belief in the successor of each rank, before anything is counted
_STEADY = np.array([0.7, 1.2, 1.5, 1.7])  # what its constancy does to the belief in the first successor


@register
class TokenRecycling(Drafter):
    """Token Recycling (Luo et al. 2024, "Turning Trash into Treasure"): a matrix of each token's ``k`` likeliest successors when
    it was last run, accepted or not; the draft follows a template of ``nodes`` rank paths up to ``depth`` levels. The published
    template has 80 nodes in 6 levels, for machines where they ride free. The kind of a guess is its level, its rank, and how
    often in a row the first successor of the token before it has stayed the same."""

    name: ClassVar[str] = "token-recycling"

    def __init__(self, vocabulary: int, nodes: int = 40, k: int = 8, depth: int = 6) -> None:
        self.k = k
        self.successors = np.full((vocabulary, k), -1, np.int32)
        self._shape = shape = _template(nodes, k, depth)
        self._levels = list(shape.levels())
        self.template = Proposal(shape.token, shape.parent, shape.depth, shape.kind * len(_STEADY))
        self.steady = np.zeros(vocabulary, np.int8)  # for each token, how often in a row its first successor was the same
        belief = np.array([_FALL[min(r, 7)] for r in range(k)])[:, None] * np.where(np.arange(k)[:, None] > 0, 1.0, _STEADY)
        self.rates = Rates(np.tile(belief.ravel(), depth + 1))

    def propose(self, history: Array, prompt: int, depth: int) -> Proposal | None:
        shape = self._shape
        token = np.empty(len(shape), np.int64)
        token[0] = history[-1]
        rank = shape.kind % self.k
        for _, level in self._levels:
            before = token[shape.parent[level]]
            token[level] = np.where(before < 0, -1, self.successors[before, rank[level]])
        there = (token >= 0) & (shape.depth <= depth)
        if not there[1]:
            return None
        full = Proposal(token, shape.parent, shape.depth, shape.kind * len(_STEADY) + self.steady[token[shape.parent]])
        return full if there.all() else full.keep(there.nonzero()[0])

    def see(self, nodes: Array, best: Array) -> None:
        same = self.successors[nodes, 0] == best[:, 0]
        # Of equal nodes the one nearest the root counts: it comes first, and the last assignment wins.
        self.steady[nodes[::-1]] = np.where(same, np.minimum(self.steady[nodes] + 1, 3), 0)[::-1]
        self.successors[nodes[::-1]] = best[::-1, : self.k]

    def tables(self) -> Mapping[str, Array]:
        return {"successors": self.successors, "steady": self.steady}


def _template(nodes: int, k: int, depth: int) -> Proposal:
    """The ``nodes`` rank paths with the largest product of beliefs, in levels; kind = level * k + rank."""
    heap: list[tuple[float, tuple[int, ...]]] = [(-_FALL[min(r, 7)], (r,)) for r in range(k)]
    heapq.heapify(heap)
    paths: list[tuple[int, ...]] = [()]
    while heap and len(paths) <= nodes:
        worth, path = heapq.heappop(heap)
        paths.append(path)
        if len(path) < depth:
            for r in range(k):
                heapq.heappush(heap, (worth * _FALL[min(r, 7)], (*path, r)))
    paths.sort(key=lambda p: (len(p), p))
    place = {path: i for i, path in enumerate(paths)}
    levels = np.array([len(p) for p in paths])
    ranks = np.array([p[-1] if p else 0 for p in paths])
    parent = np.array([place[p[:-1]] if p else -1 for p in paths])
    return Proposal(np.zeros(len(paths), np.int64), parent, levels, np.where(levels > 0, levels * k + ranks, 0))
