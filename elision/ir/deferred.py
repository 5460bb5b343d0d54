"""A step in parts whose tokens leave early, and whose later parts run on them once somebody looks there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from elision.ir.nodes import nodes_of
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

#: Runs an entry on operands and tokens.
RunOn = Callable[[str, tuple[Any, ...], Tokens], tuple[Any, ...]]


class Deferred:
    """One round of nodes ``at`` over caches and, after them, a cache for every exit: the streams of committed tokens that
    stand there, the halves of their channels as keys and values. (Defer, as the cloud does in CE-CoLLM, Jin and Wu 2024.)

    A node that goes on sees itself, its ancestors and what is committed. So its ancestors run the part with it, and before that
    the part's late form runs what its sequence holds: positions join a cache in order, whoever brings them. What a part gives
    of late tokens and of ancestors is held at the next exit; their own results are those of the exit where they left.
    """

    def __init__(self, states: Sequence[Any], targets: Sequence[str], parts: int, run_on: RunOn, at: Tokens) -> None:
        self._states, self._held = states, states[len(states) - parts + 1 :]
        self._parts, self._late = targets[:parts], targets[parts:-1]
        self._run_on, self._at, self._nodes = run_on, at, nodes_of(at)

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """The stream ``[n, width]`` of every node where it left."""
        x, here, there = ids, torch.arange(len(ids)), torch.ones(len(ids), dtype=torch.bool)
        whole = torch.empty(0)
        for i, part in enumerate(self._parts):
            h, *rest = self._run_on(part, (x, *self._states), self._at.gather(here))
            whole = h.clone() if i == 0 else torch.where(there[:, None], whole.index_copy(0, here, h), whole)
            if i == len(self._parts) - 1:
                break
            there = there & torch.zeros_like(there).index_fill(0, here[rest[0].bool()], True)
            runs = self._with_ancestors(there)[here]
            hold(self._held[i], self._at.gather(here[~runs]), h[~runs])
            x, here = h[runs], here[runs]
            if not len(here):
                break
            self._catch_up(i, sorted(set(self._at.row[here].tolist())))
        return whole

    def _with_ancestors(self, some: torch.Tensor) -> torch.Tensor:
        """Which nodes are among ``some [n]``, or ancestors of one that is."""
        wanted = torch.zeros(self._at.rows, dtype=torch.int64)
        for i in some.nonzero().flatten().tolist():
            wanted[self._at.row[i]] |= self._anc[i]
        return (wanted[self._at.row] >> self._nodes) & 1 == 1

    @property
    def _anc(self) -> torch.Tensor:
        assert self._at.anc is not None
        return self._at.anc

    def _catch_up(self, exit: int, rows: list[int]) -> None:
        """Run the part after an exit on what some sequences hold there; it is held at the next exit, if there is one."""
        store: KVStore = self._held[exit]
        tokens, h = held(store, rows)
        if not len(tokens):
            return
        h, *_ = self._run_on(self._late[exit], (h, *self._states), tokens)
        store.select(torch.zeros(len(rows), 1, 0, dtype=torch.int64), rows)
        if exit + 1 < len(self._held):
            hold(self._held[exit + 1], tokens, h)


def hold(store: KVStore, tokens: Tokens, h: torch.Tensor) -> None:
    """Add streams ``h [n, width]``."""
    if len(tokens):
        store.append(tokens, h[:, None, : store.type.dim], h[:, None, store.type.dim :])


def held(store: KVStore, rows: Sequence[int]) -> tuple[Tokens, torch.Tensor]:
    """The tokens of some sequences that are held, and their streams."""
    counts = store.totals()[:, 0].tolist()
    most, pos = max(counts), store.positions()[:, 0]
    wide = torch.cat((store.entries("k", most), store.entries("v", most)), -1)[:, 0]
    row = torch.tensor([r for r in rows for _ in range(counts[r])], dtype=torch.int64)
    entry = torch.tensor([i for r in rows for i in range(counts[r])], dtype=torch.int64)
    return Tokens(row, pos[row, entry], store.rows), wide[row, entry]
