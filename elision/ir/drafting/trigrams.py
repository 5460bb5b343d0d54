"""A tri-gram table that adapts to what is being written, searched best first."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from elision.ir.drafting.drafter import Drafter, register
from elision.ir.drafting.proposal import Array, Proposal
from elision.ir.drafting.rates import Rates

_PROBES, _WIDE = 4, 12
_GAIN, _MOST = 0.04, 3.0  # what a token gains when it was written, and its bound
_HASH = np.uint64(0x9E3779B97F4A7C15)


@register
class TriGrams(Drafter):
    """ADED (Liu et al. 2024, "Adaptive Draft-Verification for Efficient LLM Decoding"): for every pair of tokens up to 12
    successors with weights, which grow by 0.04 (to at most 3) each time they are written. The published search is Monte Carlo
    tree search over the table; its limit is the order of path weights, which a search by level with the best ``width`` paths
    finds without chance. The table begins empty and learns from prompts and outputs (``slots``: pairs that it can hold)."""

    name: ClassVar[str] = "aded"

    def __init__(self, vocabulary: int, width: int = 8, depth: int = 5, slots: int = 65536) -> None:
        self.width, self.depth = width, depth
        self.keys = np.full(slots, -1, np.int64)
        self.token = np.full((slots, _WIDE), -1, np.int32)
        self.weight = np.zeros((slots, _WIDE), np.float32)
        self.rates = Rates(np.tile(np.array([0.05, 0.15, 0.35, 0.5, 0.6]), depth * 2))

    def propose(self, history: Array, prompt: int, depth: int) -> Proposal | None:
        if len(history) < 2:
            return None
        token, parent, level, kind = [history[-1:]], [np.array([-1])], [np.array([0])], [np.array([0])]
        before, at, worth, place, size = history[-2:-1], history[-1:], np.ones(1), np.zeros(1, np.int64), 1
        for d in range(min(depth, self.depth)):
            slot = self._find(before, at)
            weights = np.where(slot[:, None] >= 0, self.weight[slot], 0)
            total = weights.sum(1, keepdims=True)
            share = weights / np.maximum(total, 1e-9)
            paths = (share * worth[:, None]).ravel()
            best = np.sort(np.argsort(-paths, kind="stable")[: self.width])
            best = best[paths[best] > 0]
            if not len(best):
                break
            source, rank = best // _WIDE, best % _WIDE
            bins = np.searchsorted([0.1, 0.3, 0.6, 0.95], share[source, rank])
            often = total[source, 0] > 2 * _GAIN
            before, at = at[source], self.token[slot[source], rank].astype(np.int64)
            token.append(at)
            parent.append(place[source])
            level.append(np.full(len(best), d + 1))
            kind.append((d * 2 + often) * 5 + bins)
            worth, place = paths[best], size + np.arange(len(best))
            size += len(best)
        if size == 1:
            return None
        return Proposal(*(np.concatenate(x) for x in (token, parent, level, kind)))

    def advance(self, history: Array, new: int) -> None:
        for end in range(max(2, len(history) - new), len(history)):
            self._write(int(history[end - 2]), int(history[end - 1]), int(history[end]))

    def nbytes(self) -> int:
        return self.keys.nbytes + self.token.nbytes + self.weight.nbytes

    def _find(self, first: Array, second: Array) -> Array:
        """The slot of each pair, -1 if it has none."""
        key = (first << 32) | second
        slots = self._slots(key)
        same = self.keys[slots] == key[:, None]
        return np.where(same.any(1), slots[np.arange(len(key)), same.argmax(1)], -1)

    def _slots(self, key: Array) -> Array:
        home = ((key.astype(np.uint64) * _HASH) >> np.uint64(33)).astype(np.int64)
        return (home[:, None] + np.arange(_PROBES)) % len(self.keys)

    def _write(self, first: int, second: int, third: int) -> None:
        key = np.array([(first << 32) | second])
        slots = self._slots(key)[0]
        held = self.keys[slots]
        same, free = held == key[0], held < 0
        slot = int(slots[(same if same.any() else free if free.any() else np.arange(_PROBES) == third % _PROBES).argmax()])
        if self.keys[slot] != key[0]:
            self.keys[slot], self.token[slot], self.weight[slot] = key[0], -1, 0.0
        known = self.token[slot] == third
        place = int(known.argmax()) if known.any() else int(self.weight[slot].argmin())
        if not known.any():
            self.token[slot, place], self.weight[slot, place] = third, 0.0
        self.weight[slot, place] = min(self.weight[slot, place] + _GAIN, _MOST)
