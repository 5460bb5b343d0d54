"""Drafts by a model: in every round, whether to draft, with which of the targets and how deep, and the trees themselves.

A round drafts only where that is expected to pay: what one level of drafts takes and how often drafts come true is measured as it
runs, what the call that verifies them takes by its number of nodes before the first draft (`elision.ir.drafting.policy`).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from elision.ir.drafting.forest import Forest, Node
from elision.ir.drafting.growth import Growth, distributions
from elision.ir.drafting.policy import Always, Policy
from elision.ir.drafting.proposal import Array
from elision.ir.drafting.rates import Rates
from elision.ir.drafting.run import Counts
from elision.ir.requests import Requests
from elision.ir.tokens import Tokens
from elision.ir.tree import roots

CHUNK = 512  # tokens of a row in one call that feeds a draft model
_BINS = 10  # kinds of drafts, by how sure the draft is of them
_KEEP = 0.98  # what a count keeps in a round: the last fifty decide
_FIRST, _LONGEST = 8, 512  # rounds without drafts after a try that did not pay, and after many
_OTHER = 16  # one drafted round in so many tries another target

#: Gives logits for ids and their tokens.
Run = Callable[[torch.Tensor, Tokens], torch.Tensor]


@dataclass
class Target:
    """What is known of one way to draft: how many levels came true of how many that could have, seconds of a level (0: not
    measured yet), nodes of a row and level, and how often drafts of each confidence were right."""

    right: float = 2.8
    tried: float = 4.0
    seconds: float = 0.0
    width: float = 1.0
    rates: Rates = field(default_factory=lambda: Rates((np.arange(_BINS) + 0.5) / _BINS))

    @property
    def chance(self) -> float:
        return min(self.right / self.tried, 0.995)

    def took(self, seconds: float) -> None:
        """A level took so long (a pause of the machine is not what it takes)."""
        self.seconds += (0.1 if self.seconds else 1.0) * (min(seconds, 3 * self.seconds or seconds) - self.seconds)


class ModelDrafting:
    """What runs share: how trees grow, the policy, and what is known of each of the targets. ``positions``: how many the draft
    has, if it is another model."""

    def __init__(
        self, name: str, growth: Growth, policy: Policy, targets: int, vocabulary: int, positions: int | None = None
    ) -> None:
        self.name, self.growth, self.policy = name, growth, policy
        self.vocabulary, self.positions = vocabulary, positions
        self.targets = [Target() for _ in range(targets)]
        self.lock = threading.Lock()
        self._wait, self._rest, self._turn, self._tries = 0, _FIRST, 0, 0

    def nbytes(self) -> int:
        return 0

    def run(self, rows: int) -> ModelRun:
        """For one run over some rows."""
        return ModelRun(self)

    def resting(self) -> ModelDrafting:
        """The same without any drafts."""
        return _Resting(self.name, self.growth, Always(0), len(self.targets), self.vocabulary, self.positions)

    def choose(self, rows: int) -> tuple[int, int]:
        """A target, and how many levels to draft with it in this round: 0 where that does not pay, but for a try now and then."""
        with self.lock:
            if not rows:
                return 0, 0
            most = self.growth.length
            found = [self.policy.levels(t.chance, t.seconds, rows, most, t.width) for t in self.targets]
            best = int(np.argmax([gain for _, gain in found]))
            levels, gain = found[best]
            self._turn += 1
            other = self._turn // _OTHER % len(self.targets)
            if unknown := [i for i, t in enumerate(self.targets) if not t.seconds]:
                return unknown[0], min(most, 3)
            if self.policy.pays(gain):
                self._rest, self._wait = _FIRST, 0
                return (other, max(found[other][0], 2)) if self._turn % _OTHER == 0 else (best, levels)
            if self._wait:
                self._wait -= 1
                return best, 0
            self._wait, self._rest = self._rest, min(4 * self._rest, _LONGEST)
            self._tries += 1
            return self._tries % len(self.targets), min(most, 2)

    def chances(self, target: int, done: _Round, born: list[Node]) -> list[float]:
        """The chance of each new node to be accepted."""
        rate = self.targets[target].rates.of(np.arange(_BINS))
        for p, i in born:
            done.chance[p, i] = done.chance.get((p, done.forest.parent[p][i]), 1.0) * float(rate[done.bin((p, i))])
        return [done.chance[n] for n in born]

    def another(self, target: int, done: _Round, frontier: list[Node], rows: int) -> bool:
        """Whether to draft the children of these nodes."""
        t = self.targets[target]
        next = sum(done.chance[n] for n in frontier) * t.chance / rows
        return self.policy.another([c for _, _, c in done.levels], next, t.seconds, rows, t.width)

    def learn(self, done: _Round, paths: list[list[int]]) -> None:
        """Count what became of a round's drafts."""
        t, forest = self.targets[done.target], done.forest
        tried = right = 0
        kinds, came = [], []
        for p, r in enumerate(forest.rows):
            path = set(paths[r])
            kinds += [done.bin((p, i)) for i in range(1, forest.size(p)) if forest.parent[p][i] in path]
            came += [i in path for i in range(1, forest.size(p)) if forest.parent[p][i] in path]
            tried, right = tried + min(len(path), max(forest.depth[p])), right + len(path) - 1
        with self.lock:
            t.right, t.tried = t.right * _KEEP + right, t.tried * _KEEP + tried
            t.rates.add(np.array(kinds, np.int64), np.array(came, bool))
            for seconds, nodes, _ in done.levels:
                if seconds:
                    t.took(seconds)
                t.width += 0.1 * (nodes - t.width)


class _Resting(ModelDrafting):
    """Drafts nothing."""

    def choose(self, rows: int) -> tuple[int, int]:
        return 0, 0


class _Round:
    """One round's trees, the target that they are from, and what is known of each node."""

    def __init__(self, forest: Forest | None = None, target: int = 0) -> None:
        self.forest = forest or Forest(torch.zeros(0), Tokens(torch.zeros(0), torch.zeros(0), 0))
        self.target = target
        self.levels: list[tuple[float, float, float]] = []  # seconds (0: unknown), nodes a row, those expected to come true
        self.state: dict[Node, float] = {}  # what the growth remembers
        self.sure: dict[Node, float] = {}  # the draft's probability
        self.chance: dict[Node, float] = {}  # to be accepted
        self.q: dict[Node, torch.Tensor] = {}  # what its children were drawn from

    def take(self, q: torch.Tensor, children: list[Node]) -> list[Node]:
        for p, i in children:
            self.sure[p, i] = float(q[self.forest.token[p][i]])
        return children

    def bin(self, node: Node) -> int:
        return min(int(self.sure[node] * _BINS), _BINS - 1)

    def drawn(self, kind: str, vocabulary: int) -> tuple[torch.Tensor, ...]:
        """``q [n, vocabulary]``, and for "iid" ``draws [n]``."""
        offsets = self.forest.offsets()
        if not self.q:
            q = torch.zeros(1, 1).expand(offsets[-1], vocabulary)
        else:
            q = torch.zeros(offsets[-1], vocabulary)
        draws = torch.ones(offsets[-1], dtype=torch.int64)
        for (p, i), line in self.q.items():
            q[offsets[p] + i] = line
        for (p, i), times in self.state.items():
            draws[offsets[p] + i] = int(times)
        return (q, draws) if kind == "iid" else (q,)


class ModelRun:
    """The drafts of a run over some rows. ``drafted``, ``sizes``, ``seconds``: as of `elision.ir.drafting.run.DraftRun`."""

    def __init__(self, drafting: ModelDrafting) -> None:
        self._all, self.drafted = drafting, 0
        self.sizes: Counter[int] = Counter()
        self.seconds = self.verify_seconds = self.commit_seconds = 0.0
        self.counts = {drafting.name: Counts()}
        self._chosen: tuple[int, int] | None = None
        self._fed: dict[int, torch.Tensor] | None = None  # by row the draft's logits after the root, if its caches are its own
        self._called = 0.0  # of the seconds of verifying and committing, what the policy has been told
        self._late = 0.0  # seconds of `feed` for what a round left
        self._round = _Round()

    def feed(self, requests: Requests, at: Tokens, have: Sequence[int], run: Run) -> None:
        """Run the draft over what its caches lack of each row, of which they hold ``have``, up to the root."""
        start = time.perf_counter()
        rows = self._rows(requests, at)
        self._chosen, self._fed, begin = self._all.choose(len(rows)), {}, list(have)
        left = {r: requests.histories[r][have[r] :] for r in rows} if self._chosen[1] else {}
        usual = all(len(part) <= self._all.growth.length + 1 for part in left.values())
        while left:
            parts = [left[r][:CHUNK] if r in left else torch.zeros(0, dtype=torch.int64) for r in range(at.rows)]
            logits = run(torch.cat(parts), Tokens.chunk([len(p) for p in parts], begin))
            for r, line in zip(sorted(left), logits, strict=True):
                left[r], begin[r] = left[r][len(parts[r]) :], begin[r] + len(parts[r])
                if not len(left[r]):
                    self._fed[r] = line
                    del left[r]
        self._late = time.perf_counter() - start if usual else 0.0
        self.seconds += time.perf_counter() - start

    def grow(
        self,
        last: torch.Tensor,
        requests: Requests,
        at: Tokens,
        kind: str | None,
        run: Callable[[int, torch.Tensor, Tokens], Any],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], Tokens]:
        """The round's trees: ids ``[n]``, what they were drawn from (as ``kind`` asks for), and their tokens."""
        start = time.perf_counter()
        rows = self._rows(requests, at)
        target, levels = self._chosen or self._all.choose(len(rows))
        self._chosen, growth = None, self._all.growth
        forest = Forest(last, at)
        done = self._round = _Round(forest, target)
        frontier = [(place, 0) for place, r in enumerate(forest.rows) if r in rows] if levels else []
        while frontier:
            begun = time.perf_counter()
            if self._fed is not None and not done.levels:
                logits = torch.stack([self._fed[forest.rows[p]] for p, _ in frontier])
            else:
                logits = run(target, *forest.some(frontier, hide_root=self._fed is not None))
            lines = distributions(forest, frontier, logits, requests)
            born: list[Node] = []
            for node, line in zip(frontier, lines, strict=True):
                if not growth.stop or float(line.max()) >= growth.stop:
                    item = requests.items[forest.rows[node[0]]]
                    born += done.take(line, growth.children(forest, node, line, item, done.state))
            if kind is not None:
                done.q |= dict(zip(frontier, lines, strict=True))
            chances = self._all.chances(target, done, born)
            took = time.perf_counter() - begun
            if self._fed is not None and not done.levels:  # its call was that of `feed`; of a prompt, it says nothing of a level
                took = took + self._late if self._late else 0.0
            done.levels.append((took, len(born) / len(rows), sum(chances) / len(rows)))
            depth = len(done.levels)
            frontier = [n for n in born if requests.room[forest.rows[n[0]]] > depth and growth.goes_on(n, done.state)]
            if depth == levels or not self._all.another(target, done, frontier, len(rows)):
                break
        ids, nodes = forest.whole() if done.levels else (last, roots(at))
        drawn = () if kind is None else done.drawn(kind, self._all.vocabulary)
        self.seconds += time.perf_counter() - start
        return ids, drawn, nodes

    def learn(self, ids: torch.Tensor, best: torch.Tensor, paths: list[list[int]]) -> None:
        """Count what was accepted (``paths``: by row, empty if it took no part)."""
        start, done, counts = time.perf_counter(), self._round, self.counts[self._all.name]
        self.sizes[len(ids)] += 1
        if (called := self.verify_seconds + self.commit_seconds) > self._called:
            self._all.policy.called(len(done.forest.rows), len(ids), called - self._called)
            self._called = called
        if done.levels:
            drafted = len(ids) - len(done.forest.rows)
            self.drafted += drafted
            counts.drafted += drafted
            counts.accepted += sum(len(paths[r]) - 1 for r in done.forest.rows)
            counts.rounds += len(done.forest.rows)
            self._all.learn(done, paths)
        self.seconds += time.perf_counter() - start

    def finish(self, row: int, history: Array, prompt: int) -> None:
        """A row has ended; there is nothing to remember of it."""

    def _rows(self, requests: Requests, at: Tokens) -> list[int]:
        """The rows with room for drafts: one that is full, or beyond the positions of the draft, has none."""
        most = self._all.positions
        for r, pos in zip(at.row.tolist(), at.pos.tolist(), strict=True) if most is not None else ():
            requests.room[r] = min(requests.room[r], most - pos)
        return [r for r in at.row.tolist() if requests.room[r] > 0]
