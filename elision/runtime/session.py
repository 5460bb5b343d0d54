"""One run over a batch of sequences: its states, and the steps of the program on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.contents import Contents, begin_with, contents
from elision.ir.drafting.model import ModelRun
from elision.ir.drafting.run import DraftRun
from elision.ir.interp import Interpreter
from elision.ir.ops.depth import chosen
from elision.ir.program import Program, running
from elision.ir.requests import Requests
from elision.ir.states import KV
from elision.ir.store import ArrayStore, KVStore
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES
from elision.ir.value import Graph

CHUNK = 512  # tokens of one prefill call (the interpreter: of each row): bounds the memory of activations and scores


class Session:
    """States for ``rows`` sequences of up to ``capacity`` positions each, and what has been committed to them.

    Every run has its own, so concurrent runs of one model do not meet.
    """

    def __init__(self, interpreter: Interpreter, rows: int, capacity: int, drafts: DraftRun | ModelRun | None = None) -> None:
        self._interpreter, self.rows, self.capacity = interpreter, rows, capacity
        program = interpreter.program
        make = interpreter.cache or partial(KVStore, dtype=DTYPES[program.meta["dtype"]])
        self._stores: dict[str, Any] = {
            name: make(type, rows, capacity) if isinstance(type, KV) else ArrayStore(type, rows)
            for name, type in program.states.items()
        }
        self.committed, self.drafts = [0] * rows, drafts
        routers, self._threshold = _routers(program)
        self._sums = torch.zeros(rows, routers)  # over the tokens of each prompt
        self.depth: list[int] = []  # what each prompt chose of the steps of a `routed` round

    def bytes(self) -> int:
        """Bytes allocated for states."""
        return sum(store.bytes() for store in self._stores.values())

    def begin(self, length: int, states: Mapping[str, Contents]) -> None:
        """Every sequence begins as a copy of the one whose first ``length`` tokens gave these states (`contents`)."""
        for name, arrays in states.items():
            begin_with(self._stores[name], arrays)
        self.committed = [length] * self.rows

    def contents(self) -> dict[str, Contents]:
        """The states of the one sequence."""
        return {name: contents(store) for name, store in self._stores.items()}

    def prefill(self, prompts: list[list[int]], chunk: int = CHUNK) -> torch.Tensor:
        """Commit the prompts; the logits ``[rows, vocab]`` after the last token of each."""
        ends = [n + len(p) for n, p in zip(self.committed, prompts, strict=True)]
        final = self.read(prompts, ends, chunk)
        self._tick(range(self.rows), always=True)
        self._stores = {n: s if isinstance(s, ArrayStore) else s.settled(min(ends)) for n, s in self._stores.items()}
        if self._sums.shape[1]:
            self.depth = chosen(self._sums / torch.tensor(self.committed)[:, None], self._threshold)
        return torch.stack([f for f in final if f is not None])

    def read(self, prompts: list[list[int]], ends: list[int], chunk: int = CHUNK) -> list[torch.Tensor | None]:
        """Commit parts of prompts that are ``ends`` tokens long; the logits after each. Prompts whose end says which of their
        tokens stay are not cut."""
        graph = self._interpreter.program.entries["prefill"]
        chunk = max(chunk, sum(map(len, prompts))) if _chooses(graph) else chunk
        final: list[torch.Tensor | None] = [None] * self.rows
        done = [0] * self.rows
        for counts in _portions([len(p) for p in prompts], chunk, together="prefill" in self._interpreter.natives):
            parts = [p[i : i + n] for p, i, n in zip(prompts, done, counts, strict=True)]
            done = [i + n for i, n in zip(done, counts, strict=True)]
            at = Tokens.chunk([len(p) for p in parts], self.committed, ends)
            ids = torch.tensor([t for p in parts for t in p], dtype=torch.int64)
            logits, *rest = self._run(graph, {"ids": ids}, at)
            for i, found in enumerate(rest[: self._sums.shape[1]]):
                self._sums[:, i].index_add_(0, at.row, torch.sigmoid(found.flatten().float()))
            there = [r for r in range(self.rows) if parts[r]]
            for r, row_logits in zip(there, logits, strict=True):
                final[r] = row_logits
                self.committed[r] += len(parts[r])
            self._tick(there, within=True)
        return final

    def round(self, last: dict[int, int], requests: Requests) -> list[list[int]]:
        """One round of generation for the sequences of ``last`` (row to its last token, which is not in the states yet).

        Returns the new tokens of every sequence, empty for one that took no part.
        """
        program = self._interpreter.program
        assert program.round is not None
        rows = sorted(last)
        at = Tokens(torch.tensor(rows), torch.tensor([self.committed[r] for r in rows]), self.rows)
        ids = torch.tensor([last[r] for r in rows], dtype=torch.int64)
        requests.room = [self._room(position) for position in self.committed]
        requests.depth = self.depth
        tokens, *_ = self._run(program.round, {"last": ids, "requests": requests, "drafts": self.drafts}, at)
        for r in rows:
            self.committed[r] += len(tokens[r])
        self._tick(rows)
        return tokens  # type: ignore[no-any-return]

    def _room(self, position: int) -> int:
        """How many levels of drafts a sequence with so many committed tokens may have: a round commits the root and the accepted
        drafts, which must not cross a tick of the clock or the end of the step that runs them, nor give more than there is
        room for (the last token is never committed)."""
        program = self._interpreter.program
        every = [tick.every - position % tick.every for tick in program.ticks if tick.every]
        assert program.round is not None
        ends = [end - position for end in running(program.round).attr("until", ()) if end > position]
        return min([self.capacity - 1 - position, *every, *ends]) - 1

    def _run(self, graph: Any, inputs: dict[str, Any], at: Tokens) -> tuple[Any, ...]:
        if int(at.pos.max()) >= self.capacity:
            raise BadInput(f"position {int(at.pos.max())} is beyond the {self.capacity} that this run has room for")
        axis = next(d for d in graph.inputs[0].tensor.axes)
        return self._interpreter.run(graph, {**self._stores, **inputs}, {axis.name: at})

    def _tick(self, rows: Iterable[int], always: bool = False, within: bool = False) -> None:
        """Run what is due on the clock: for the rows whose committed position is 0 mod every, after prefill for all, and
        ``within`` it what runs after every part of a prompt."""
        for tick in self._interpreter.program.ticks:
            if within:
                due = list(rows) if tick.chunks else []
            else:
                due = [r for r in rows if always or (tick.every and self.committed[r] % tick.every == 0)]
            if due:
                at = Tokens(torch.tensor(due), torch.tensor([self.committed[r] for r in due]), self.rows)
                self._run(tick.graph, {"rows": torch.tensor(due)}, at)


def must_divide(program: Program) -> None:
    """Raises BadInput if what becomes of a prompt's beginning depends on its end."""
    if program.edits or _chooses(program.entries["prefill"]) or _routers(program)[0]:
        raise BadInput(
            f"what {', '.join(program.applied)} make of a prompt depends on all of it, so there are no prefixes; leave out what "
            "edits or prunes prompts, or routes by them"
        )


def _chooses(graph: Graph) -> bool:
    """Whether tokens are left out of later layers."""
    return any(v.op in ("which", "clusters") for v in graph.values)


def _routers(program: Program) -> tuple[int, float]:
    """How many routers prefill has, and the threshold of their choice."""
    value = running(program.round) if program.round is not None else None
    return (len(value.attr("targets")) - 1, value.attr("threshold")) if value is not None and value.op == "routed" else (0, 0.0)


def _portions(lengths: Sequence[int], chunk: int, together: bool) -> Iterator[list[int]]:
    """How many tokens of every prompt each prefill call takes: up to ``chunk`` of each, or (``together``) of all of them."""
    left = list(lengths)
    while any(left):
        room, counts = chunk, []
        for n in left:
            counts.append(min(n, room))
            room -= counts[-1] if together else 0
        left = [n - taken for n, taken in zip(left, counts, strict=True)]
        yield counts
