"""A tree of guessed tokens for one row, and what is done with trees: along paths, cut, merged, compared with what came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))


@dataclass(frozen=True)
class Proposal:
    """Nodes in levels: slot 0 is the root, the last committed token; ``parent[i] < i`` (-1 for the root), ``depth[i]`` edges
    below it. ``kind[i]`` sorts the guesses for `elision.ir.drafting.rates`. All int64 ``[n]``; equal siblings are not allowed."""

    token: Array
    parent: Array
    depth: Array
    kind: Array

    def __len__(self) -> int:
        return len(self.token)

    def levels(self) -> Iterator[tuple[int, slice]]:
        """Each depth below the root with the nodes at it."""
        deepest = int(self.depth[-1])
        bounds = np.searchsorted(self.depth, np.arange(1, deepest + 2)).tolist()
        for d in range(deepest):
            yield d + 1, slice(bounds[d], bounds[d + 1])

    def along(self, edges: Array, least: float = 0.0) -> Array:
        """The product of ``edges [n]`` from the root to each node (1 at the root). Below a level at which none reaches ``least``
        it is 0."""
        found = np.zeros(len(edges))
        found[0] = 1.0
        for _, level in self.levels():
            found[level] = found[self.parent[level]] * edges[level]
            if least and found[level].max() < least:
                break
        return found

    def names(self) -> Array:
        """A number for the path to each node, uint64: different paths have different ones but for chance (2^-64)."""
        found = np.zeros(len(self), np.uint64)
        code = self.token.astype(np.uint64) * _MIX[0]
        for _, level in self.levels():
            mixed = (found[self.parent[level]] ^ code[level]) * _MIX[1] + np.uint64(1)
            found[level] = mixed ^ (mixed >> np.uint64(29))
        return found

    def ancestors(self) -> Array:
        """Per node the bitset of its ancestors and itself, as int64 (at most 64 nodes)."""
        found = np.left_shift(np.uint64(1), np.arange(len(self), dtype=np.uint64))
        for _, level in self.levels():
            found[level] |= found[self.parent[level]]
        return found.view(np.int64)

    def keep(self, nodes: Array) -> Proposal:
        """Only these nodes (ascending; with every node its parent)."""
        parent = np.searchsorted(nodes, self.parent[nodes])
        parent[0] = -1
        return Proposal(self.token[nodes], parent, self.depth[nodes], self.kind[nodes])

    def outcomes(self, tokens: Array) -> tuple[Array, Array]:
        """Which guesses are settled by the ``tokens`` that came after the root (their parents came true), and which of the nodes
        came true: two bool ``[n]``, the root in the second only."""
        settled, right = np.zeros(len(self), bool), np.zeros(len(self), bool)
        right[0] = True
        for d, level in self.levels():
            if d > len(tokens):
                break
            settled[level] = right[self.parent[level]]
            right[level] = settled[level] & (self.token[level] == tokens[d - 1])
            if not right[level].any():
                break
        return settled, right


def chain(token: int, tokens: Array, kinds: Array) -> Proposal:
    """One guess after the other."""
    n = len(tokens) + 1
    place = np.arange(n)
    return Proposal(np.concatenate(([token], tokens)), place - 1, place, np.concatenate(([0], kinds)))


def merge(proposals: Sequence[Proposal], worths: Sequence[Array]) -> tuple[Proposal, Array, Array]:
    """The union of trees with one root: equal paths become one node. ``worths[d][i]``: the chance that node i of tree d is right
    given its parent (below 1). Returns the tree (kinds are 0), the chance of each node by noisy-or over the trees that have it,
    and a bitset of these trees."""
    if len(proposals) == 1:
        return proposals[0], worths[0], np.ones(len(proposals[0]), np.int64)
    begins = np.cumsum([0, *(len(p) for p in proposals[:-1])])
    token, depth = (np.concatenate([getattr(p, name) for p in proposals]) for name in ("token", "depth"))
    before = np.concatenate([np.maximum(p.parent, 0) + start for p, start in zip(proposals, begins, strict=True)])
    names = np.concatenate([p.names() for p in proposals])
    _, first, which = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(depth[first], kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    place, first = rank[which], first[order]
    parent = place[before[first]]
    parent[0] = -1
    missed = np.bincount(place, weights=np.log1p(-np.minimum(np.concatenate(worths), 0.999)), minlength=len(first))
    sources = np.zeros(len(first), np.int64)
    np.bitwise_or.at(sources, place, np.repeat(1 << np.arange(len(proposals)), [len(p) for p in proposals]))
    return Proposal(token[first], parent, depth[first], np.zeros(len(first), np.int64)), -np.expm1(missed), sources
