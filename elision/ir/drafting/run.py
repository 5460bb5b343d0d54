"""The drafts of one run: trees from all drafters, merged and cut, and what became of them."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from elision.ir.drafting.drafter import Drafter
from elision.ir.drafting.policy import SIZES, Always, Policy
from elision.ir.drafting.proposal import Array, Proposal, merge
from elision.ir.requests import Requests
from elision.ir.tokens import Tokens
from elision.ir.tree import MAX_NODES, roots

_LOOK = 8  # a proposal is compared with so many tokens, once they are there
_LEAST = 0.02  # a path with a smaller chance is not considered: no machine runs a node for that
_REST = 8  # while nothing pays, one round in so many is drafted, to see whether that has changed


@dataclass
class Counts:
    """What a drafter did in a run: nodes that were run, and those accepted, the end of the
    text cutting some of these off (a node that several propose counts for each); ``rounds`` in which it had nodes."""

    drafted: int = 0
    accepted: int = 0
    rounds: int = 0


@dataclass(eq=False)
class Drafting:
    """The drafters of a model, whose memory all its runs share, and the policy of its machine."""

    drafters: list[Drafter]
    policy: Policy
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, rows: int) -> DraftRun:
        """For one run over some rows."""
        return DraftRun(self, rows)

    def resting(self) -> Drafting:
        """The same without any drafts."""
        return Drafting([], Always(0))

    def nbytes(self) -> int:
        """Bytes of the drafters' tables."""
        return sum(d.nbytes() for d in self.drafters)


class DraftRun:
    """The trees of a run over some rows. ``drafted``: nodes that were run beside the roots; ``sizes``: how many rounds ran how
    many nodes; ``seconds``: time spent on drafting and learning; in running the trees and in committing what was accepted where
    the round is native."""

    def __init__(self, drafting: Drafting, rows: int) -> None:
        self._all, self.drafted = drafting, 0
        self.sizes: Counter[int] = Counter()
        self.seconds = self.verify_seconds = self.commit_seconds = 0.0
        self.counts = {d.name: Counts() for d in drafting.drafters}
        self._open: list[deque[tuple[int, list[Proposal | None]]]] = [deque() for _ in range(rows)]
        self._sources: dict[int, Array] = {}  # by row, which drafters proposed each node of this round's tree
        self._seen = [0] * rows  # tokens of each row that the drafters have read
        self._round = 0.0  # seconds of this round
        self._called = 0.0  # of the seconds of verifying and committing, what the policy has been told
        self._idle = 0  # rounds since drafting paid
        self._promise = np.zeros(0)  # of trees that are made elsewhere, the chances that they have had, largest first

    def propose(self, last: torch.Tensor, requests: Requests, at: Tokens) -> tuple[torch.Tensor, Tokens]:
        """The round's trees: ids ``[n]`` and their tokens, row by row, roots first."""
        start = time.perf_counter()
        rows, pos = at.row.tolist(), at.pos.tolist()
        self._sources = {}
        trees: dict[int, tuple[Proposal, Array, Array]] = {}
        if self._idle % _REST == 0:
            with self._all.lock:
                for r in rows:
                    if (found := self._tree(r, requests)) is not None:
                        trees[r] = found
        chances = np.concatenate([c[1:] for _, c, _ in trees.values()]) if trees else np.zeros(0)
        order = np.argsort(-chances, kind="stable")
        count = self._all.policy.nodes(chances[order], len(rows)) if trees else 0
        self._idle = 0 if count or (not trees and not self._idle) else self._idle + 1
        if not count:
            out = last, roots(at)
        else:
            chosen = np.zeros(len(chances), bool)
            chosen[order[:count]] = True
            out = self._cut(last, rows, pos, trees, chosen, at.rows)
        self._round = time.perf_counter() - start
        return out

    def learn(self, ids: torch.Tensor, best: torch.Tensor, paths: list[list[int]]) -> None:
        """Show the round's nodes to the drafters, and count what was accepted (``paths``: by row, empty if it took no part)."""
        start = time.perf_counter()
        with self._all.lock:
            for drafter in self._all.drafters:
                drafter.see(ids.numpy(), best.numpy())
        self._count(paths, len(ids), len(ids))
        self._round += time.perf_counter() - start
        if self._sources:
            self._all.policy.took(self._round)
        self.seconds += self._round

    def _count(self, paths: list[list[int]], nodes: int, size: int) -> None:
        """What became of ``nodes`` in a call over ``size``."""
        for r, bits in self._sources.items():
            self.drafted += len(bits) - 1
            right = bits[paths[r][1:]]
            for i, counts in enumerate(self.counts.values()):
                counts.drafted += int((bits[1:] >> i & 1).sum())
                counts.accepted += int((right >> i & 1).sum())
                counts.rounds += int((bits[1:] >> i & 1).any())
        self.sizes[nodes] += 1
        if (called := self.verify_seconds + self.commit_seconds) > self._called:
            self._all.policy.called(sum(bool(p) for p in paths), size, called - self._called)
            self._called = called

    @property
    def alone(self) -> Drafter | None:
        """The one drafter, if all its trees are parts of one template: they may be made where the model runs."""
        found = self._all.drafters
        return found[0] if len(found) == 1 and found[0].template is not None else None

    def ahead(self, rows: Sequence[int], requests: Requests, most: int) -> int:
        """For trees of ``alone`` that are not known here yet: how many nodes beside the root each of these rows has this round,
        the same for all and at most ``most``, by the chances that their trees have had."""
        start = time.perf_counter()
        drafter = self._all.drafters[0]
        assert drafter.template is not None
        with self._all.lock:
            for r in rows:
                self._read(r, requests.histories[r].numpy())
            if not len(self._promise):
                self._promise = _worth(drafter, drafter.template)
        count = self._all.policy.nodes(np.repeat(self._promise, len(rows)), len(rows))
        size = min(most, -(-count // len(rows))) + 1
        self._round = time.perf_counter() - start
        return SIZES[bisect_right(SIZES, size) - 1] - 1

    def made(
        self, rows: Sequence[int], requests: Requests, drafted: list[int], accepted: list[int], found: list[Proposal | None],
        size: int,
    ) -> None:  # fmt: skip
        """What became of such trees: of each row the nodes that were run and those that were accepted beside its root, and all
        that was guessed; ``size``: nodes of the call."""
        start = time.perf_counter()
        paths: list[list[int]] = [[] for _ in self._open]
        with self._all.lock:
            for r, n, tree in zip(rows, accepted, found, strict=True):
                self._open[r].append((len(requests.histories[r]), [tree]))
                paths[r] = [0] * (n + 1)
                worth = np.zeros(len(self._promise)) if tree is None else _worth(self._all.drafters[0], tree)
                self._promise[: len(worth)] += (worth - self._promise[: len(worth)]) / 8
                self._promise[len(worth) :] *= 7 / 8
        self._sources = {r: np.ones(n + 1, np.int64) for r, n in zip(rows, drafted, strict=True) if n}
        self._count(paths, len(rows) + sum(drafted), size)
        self._round += time.perf_counter() - start
        if self._sources:
            self._all.policy.took(self._round)
        self.seconds += self._round

    def finish(self, row: int, history: Array, prompt: int) -> None:
        """A row has ended: its last tokens are read, and drafters that remember outputs take it in."""
        with self._all.lock:
            self._read(row, history)
            for drafter in self._all.drafters:
                drafter.finish(history, prompt)

    def _tree(self, r: int, requests: Requests) -> tuple[Proposal, Array, Array] | None:
        """The row's merged tree, the chance of each of its nodes, and who proposed it."""
        history, room = requests.histories[r].numpy(), requests.room[r]
        self._read(r, history)
        found = [d.propose(history, requests.prompts[r], room) if room > 0 else None for d in self._all.drafters]
        self._open[r].append((len(history), found))
        trees, edges, whose = [], [], []
        for i, (drafter, proposal) in enumerate(zip(self._all.drafters, found, strict=True)):
            if proposal is None:
                continue
            chances = drafter.rates.of(proposal.kind)
            keep = np.flatnonzero(proposal.along(chances, _LEAST) >= _LEAST)
            if len(keep) > 1:
                trees.append(proposal.keep(keep))
                edges.append(chances[keep])
                whose.append(i)
        if not trees:
            return None
        tree, chances, bits = merge(trees, edges)
        bits = np.sum([((bits >> n) & 1) << i for n, i in enumerate(whose)], 0)
        return tree, tree.along(chances), bits

    def _cut(
        self, last: torch.Tensor, rows: list[int], pos: list[int], trees: dict[int, tuple[Proposal, Array, Array]], chosen: Array,
        sequences: int,
    ) -> tuple[torch.Tensor, Tokens]:  # fmt: skip
        ids, row, where, parent, anc = [], [], [], [], []
        begin = 0
        for i, r in enumerate(rows):
            if r in trees:
                tree, _, bits = trees[r]
                keep = np.concatenate(([0], 1 + chosen[begin : begin + len(tree) - 1].nonzero()[0]))[:MAX_NODES]
                begin += len(tree) - 1
                tree, self._sources[r] = tree.keep(keep), bits[keep]
            else:
                tree = Proposal(last[i : i + 1].numpy(), np.array([-1]), np.array([0]), np.array([0]))
            ids.append(tree.token)
            row.append(np.full(len(tree), r))
            where.append(pos[i] + tree.depth)
            parent.append(tree.parent)
            anc.append(tree.ancestors())
        parts = [torch.from_numpy(np.concatenate(x)) for x in (ids, row, where, parent, anc)]
        return parts[0], Tokens(parts[1], parts[2], sequences, parts[3], parts[4])

    def _read(self, r: int, history: Array) -> None:
        """Take in the tokens of a row that are new, and count what was proposed for it ``_LOOK`` tokens ago."""
        waiting = self._open[r]
        while waiting and len(history) - waiting[0][0] >= _LOOK:
            length, found = waiting.popleft()
            for drafter, proposal in zip(self._all.drafters, found, strict=True):
                if proposal is not None:
                    drafter.rates.count(proposal, history[length : length + _LOOK])
        for drafter in self._all.drafters:
            drafter.advance(history, len(history) - self._seen[r])
        self._seen[r] = len(history)


def _worth(drafter: Drafter, tree: Proposal) -> Array:
    """The chances of a tree's nodes beside the root, largest first."""
    found: Array = -np.sort(-tree.along(drafter.rates.of(tree.kind))[1:])
    return found
