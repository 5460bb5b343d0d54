"""A tree of guessed tokens for one row, and what is done with trees: along paths, cut, merged, compared with what came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


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

    def along(self, edges: Array) -> Array:
        """The product of ``edges [n]`` from the root to each node (1 at the root)."""
        found = edges.copy()
        found[0] = 1.0
        for _, level in self.levels():
            found[level] *= found[self.parent[level]]
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
    """The union of trees with one root: equal paths become one. ``worths[d][i]``: the chance that node i of tree d is right given
    its parent. Returns the tree (kinds are 0), the chance of each node by noisy-or over the trees that have it, and a bitset of
    these trees."""
    if len(proposals) == 1:
        return proposals[0], worths[0], np.ones(len(proposals[0]), np.int64)
    place = [np.zeros(len(p), np.int64) for p in proposals]  # where each tree's nodes are in the union
    deepest = max(int(p.depth[-1]) for p in proposals)
    token, parent, depth = [proposals[0].token[:1]], [np.array([-1])], [np.array([0])]
    missed, sources = [np.zeros(1)], [np.array([(1 << len(proposals)) - 1])]
    size = 1
    for d in range(1, deepest + 1):
        at = [(i, slice(*np.searchsorted(p.depth, (d, d + 1)))) for i, p in enumerate(proposals)]
        keys = np.concatenate([(place[i][proposals[i].parent[s]] << 32) | proposals[i].token[s] for i, s in at])
        unique, inverse = np.unique(keys, return_inverse=True)
        miss, source = np.ones(len(unique)), np.zeros(len(unique), np.int64)
        begin = 0
        for i, s in at:
            mine = inverse[begin : begin + s.stop - s.start]
            begin += len(mine)
            place[i][s] = mine + size
            miss[mine] *= 1 - worths[i][s]
            source[mine] |= 1 << i
        token.append(unique & 0xFFFFFFFF)
        parent.append(unique >> 32)
        depth.append(np.full(len(unique), d))
        missed.append(miss)
        sources.append(source)
        size += len(unique)
    tokens = np.concatenate(token)
    tree = Proposal(tokens, np.concatenate(parent), np.concatenate(depth), np.zeros(len(tokens), np.int64))
    return tree, 1 - np.concatenate(missed), np.concatenate(sources)
