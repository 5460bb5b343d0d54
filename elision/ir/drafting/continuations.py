"""Continuation tries: everything that followed the last tokens before, in this prompt and in what was said, as one tree."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from elision.ir.drafting.drafter import Drafter, register
from elision.ir.drafting.proposal import Array, Proposal
from elision.ir.drafting.rates import Rates

_OCCURRENCES = 64  # of each source, the most recent
_SHARES = np.array([0.1, 0.3, 0.6, 0.95])  # bounds between the kinds by share of the parent's count
_LATER = 1e-4  # weight of outputs against the prompt: they break its ties


@register
class ContinuationTrie(Drafter):
    """Trie retrieval of Lookahead (Zhao et al. 2023, "Lookahead: An Inference Acceleration Framework"). The published tries hold
    every window of ``branch`` tokens of the prompt and of outputs; here the part of them under the last ``match`` tokens (or
    fewer, if that gives under ``branch`` nodes) is made when it is asked for, from all places where these tokens stand: the same
    nodes and counts, with nothing to keep up to date.

    Prompt counts come first, outputs break ties (weight 1e-4), the best ``nodes`` stay. Outputs of earlier requests are kept in a
    ring of ``memory`` tokens, the oldest of which are overwritten (the published eviction halves counts instead). The kind of a
    guess is the length of its match, its level, its share of its parent's count and how often it was seen.
    """

    name: ClassVar[str] = "pain-trie"

    def __init__(self, vocabulary: int, match: int = 2, branch: int = 12, nodes: int = 63, memory: int = 65536) -> None:
        self.match, self.branch, self.nodes = match, branch, nodes
        self.ring = np.full(memory, -1, np.int32)
        self._next = 0
        share = np.array([0.05, 0.15, 0.35, 0.6, 0.8])
        self.rates = Rates(np.tile(np.repeat(share, 3), match * 4))

    def propose(self, history: Array, prompt: int, depth: int) -> Proposal | None:
        best: Proposal | None = None
        for m in range(min(self.match, len(history) - 1), 0, -1):
            found = self._tree(history, prompt, m, min(depth, self.branch))
            if found is not None and (best is None or len(found) > len(best)):
                best = found
            if best is not None and len(best) >= self.branch:
                break
        return best

    def finish(self, history: Array, prompt: int) -> None:
        said = np.append(history[prompt:], -1)[-len(self.ring) :]
        at = (self._next + np.arange(len(said))) % len(self.ring)
        self.ring[at] = said
        self._next = (self._next + len(said)) % len(self.ring)

    def nbytes(self) -> int:
        return self.ring.nbytes

    def _tree(self, history: Array, prompt: int, m: int, depth: int) -> Proposal | None:
        suffix = history[len(history) - m :]
        own, other = _after(history, suffix, m), _after(self.ring, suffix, m)
        windows = np.concatenate((_windows(history, own, depth), _windows(self.ring, other, depth)))
        if not len(windows):
            return None
        weight = np.full(len(windows), _LATER)
        weight[: len(own)][own < prompt] = 1 - _LATER
        return self._grow(int(history[-1]), windows, weight, m)

    def _grow(self, last: int, windows: Array, weight: Array, m: int) -> Proposal:
        """The trie of the rows of ``windows [o, depth]`` (-1 ends a row), by one sort."""
        order = np.lexsort(windows.T[::-1])
        windows, weight = windows[order], weight[order]
        there = np.logical_and.accumulate(windows >= 0, 1)
        begins = np.ones_like(there)  # a row begins a node at a level where it differs from the row before at or above it
        begins[1:] = np.logical_or.accumulate(windows[1:] != windows[:-1], 1)
        begins &= there
        rows = begins.sum(0)
        node = np.where(there, begins.cumsum(0) + (rows.cumsum() - rows), 0)  # 1 + its place by level, 0 for none
        level, row = begins.T.nonzero()
        n = len(level) + 1
        count = np.bincount(node[there], weights=np.broadcast_to(weight[:, None], there.shape)[there], minlength=n)
        seen = np.bincount(node[there], minlength=n)
        count[0], seen[0] = weight.sum(), len(weight)
        parent = np.concatenate(([-1], np.where(level > 0, node[row, level - 1], 0)))
        token = np.concatenate(([last], windows[row, level]))
        share = np.searchsorted(_SHARES, count / np.maximum(count[parent], 1e-30))
        depth = np.concatenate(([0], level + 1))
        step = np.minimum(np.searchsorted([1, 2, 4], depth), 3)
        kind = (((m - 1) * 4 + step) * 5 + share) * 3 + np.minimum(np.searchsorted([1, 3], seen), 2)
        found = Proposal(token, parent, depth, kind)
        if n - 1 <= self.nodes:
            return found
        keep = np.argsort(-count[1:], kind="stable")[: self.nodes] + 1  # a child's count is never above its parent's
        return found.keep(np.concatenate(([0], np.sort(keep))))


def _after(tokens: Array, suffix: Array, m: int) -> Array:
    """The most recent places after an occurrence of ``suffix``, the end itself left out."""
    found: Array = np.flatnonzero(tokens[m - 1 : len(tokens) - 1] == suffix[-1]) + m
    for j in range(1, m):
        found = found[tokens[found - 1 - j] == suffix[-1 - j]]
    return found[-_OCCURRENCES:]


def _windows(tokens: Array, places: Array, length: int) -> Array:
    at = places[:, None] + np.arange(length)
    found: Array = np.where(at < len(tokens), tokens[np.minimum(at, len(tokens) - 1)], -1)
    return found
