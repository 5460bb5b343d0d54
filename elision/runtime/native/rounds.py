"""A round of generation on native code: one call into it, two if there are drafts (and those of a model that
drafts), and as little Python around as there can be.

It does what the round's graph says (`elision.ir.program.round_of`), for rounds of that form only; any other round is left to the
interpreter, which runs the same entries through `Engine.run`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from elision.ir import schedule as abi
from elision.ir.drafted import Drafted
from elision.ir.flatten import decoding
from elision.ir.op import lookup
from elision.ir.ops.depth import routes, stages
from elision.ir.program import FORWARD, committed_states, running
from elision.ir.states import KV, Budget
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.tree import roots
from elision.ir.value import Graph
from elision.ir.walk import ran
from elision.runtime.native.table import Table

if TYPE_CHECKING:
    from elision.runtime.native.engine import Engine

_FORM = {*FORWARD, "checkpoint", "root", "draft", "feed", "guess", "item", "verify", "commit", "drop", "emit", "learn"}
Longs = np.ndarray[Any, np.dtype[np.int64]]


def has_form(graph: Graph, schedules: Mapping[str, abi.Schedule]) -> bool:
    """Whether a round is one that `Round` runs: nothing in it but the ops of generation, and no row of a step on the
    host (but between the parts of one with exits)."""
    ops = [v.op for v in graph.values if v.op not in ("input", "param")]
    plain = set(ops) <= _FORM and sum(map(ops.count, FORWARD)) == ops.count("verify") == 1
    caches = all(isinstance(v.type, KV) for v in graph.inputs if v.is_state)
    if not plain or not caches or "commit" not in schedules:
        return False
    if running(graph).op == "exits":
        return True
    names = [name for step in ran(running(graph)) for name in (step, decoding(step)) if name in schedules]
    return all(row.host < 0 for name in names for row in schedules[name].rows)


class _Arrays:
    """Memory of a token axis that native code reads, with room for ``n`` tokens of ``rows`` sequences."""

    def __init__(self, n: int, rows: int) -> None:
        self.n, self.rows = n, rows
        self.of: dict[str, Longs] = {name: np.zeros(n, np.int64) for name in ("row", "pos", "anc", "node")}
        self.of["start"] = np.zeros(rows + 1, np.int64)
        self._words = [(abi.AXES + abi.AXIS[name], array.ctypes.data) for name, array in self.of.items()]

    def place(self, context: Longs, row: Longs, node: Longs, **more: Longs) -> None:
        n = len(row)
        self.of["row"][:n], self.of["node"][:n] = row, node
        for name, array in more.items():
            self.of[name][:n] = array
        if self.rows == 1:
            self.of["start"][1] = n
        else:
            self.of["start"][:] = np.searchsorted(row, np.arange(self.rows + 1))
        context[abi.AXES + abi.AXIS["count"]] = n
        for word, address in self._words:
            context[word] = address


class _Entry:
    """A step or its committed form: where its table has the ids, the logits and the likeliest tokens."""

    def __init__(self, engine: Engine, schedule: abi.Schedule) -> None:
        self._engine, self.schedule = engine, schedule
        self._table: Table | None = None

    def table(self, ids: Longs) -> Table:
        """The entry's table with these ids in it."""
        table = self._engine.table(self.schedule, [len(ids)] * len(self.schedule.axes))
        if table is not self._table:
            place = ("view", self.schedule.inputs[0], 0, (), (), "i64", self.schedule.buffers[self.schedule.inputs[0]].axis)
            self._ids = table.view(place, table.capacity[0]).numpy()
            self.logits, self.best = (table.view(place, table.capacity[0]) for place in self.schedule.outputs)
            self._table = table
        self._ids[: len(ids)] = ids
        return table


class Round:
    """The native form of a program's round. Called as the interpreter calls any: operands in order, tokens of their axis."""

    def __init__(self, engine: Engine, graph: Graph) -> None:
        self._engine, self._commit = engine, engine.schedules["commit"]
        self._run_of, self._until = running(graph), running(graph).attr("until", ())
        names = ran(self._run_of) if self._run_of.op != "exits" else ()
        self._steps = [_Entry(engine, engine.schedules[name]) for name in names]
        decoded = [engine.schedules.get(decoding(name)) for name in names]
        self._decodes = [_Entry(engine, schedule) for schedule in decoded if schedule is not None]
        self._names = [graph.names[v] for v in graph.inputs]
        kv = {graph.names[v]: v.type for v in graph.inputs if isinstance(v.type, KV)}
        self._bounded = [name for name, type in kv.items() if isinstance(type.main[-1].slots, Budget)]
        self._caches = [graph.names[v] for v in graph.inputs if v.is_state]
        self._feed, self._guess, self._verify = (
            next((v for v in graph.values if v.op == op), None) for op in ("feed", "guess", "verify")
        )
        assert self._verify is not None
        self._kind, self._rule = self._verify.attr("kind"), self._verify.attr("rule")
        self._committed = committed_states(engine.program)
        self._dropped = [name for name in self._caches if name not in self._committed]
        self._arrays = _Arrays(0, 0)
        self._room: tuple[Callable[[], KVStore | None], int] = (lambda: None, 0)

    def __call__(self, args: Sequence[Any], at: Tokens) -> tuple[Any, ...]:
        given = dict(zip(self._names, args, strict=True))
        requests, drafts, last = given["requests"], given.get("drafts"), given["last"]
        states, drawn_from = {name: given[name] for name in self._caches}, None
        if drafts is None:
            ids, nodes = last, roots(at)
        elif self._guess is None:
            ids, nodes = drafts.propose(last, requests, at)
        else:
            ids, nodes, drawn_from = self._grow(given, at)
        n = len(ids)
        direct = n == len(last) and bool(self._decodes)
        if direct:
            self._need_room(states, np.bincount(at.row.numpy(), minlength=at.rows))
        with self._engine.lock:
            start = time.perf_counter()
            parts = routes(requests.depth, nodes) if self._run_of.op == "routed" else []
            parts = stages(self._until, nodes) if self._until else parts
            logits, best = self._forward(self._decodes if direct else self._steps, parts, ids, nodes, states)
            paths, drawn = requests.verify(ids, logits, best, nodes, drawn_from, self._rule)
            middle = time.perf_counter()
            if not direct:
                self._accept(paths, states)
            for name in self._dropped:
                states[name].drop()
            if drafts is not None:
                drafts.verify_seconds += middle - start
                drafts.commit_seconds += time.perf_counter() - middle
                drafts.learn(ids, best, paths)
        tokens = lookup("emit").body(ids, paths, drawn, at=nodes)
        return (tokens, drawn, *states.values(), *(() if drafts is None else (drafts,)))

    def _grow(self, given: dict[str, Any], at: Tokens) -> tuple[torch.Tensor, Tokens, Drafted | None]:
        """Drafts of a model: its entries run as any other."""
        operands = (given["requests"], given["drafts"], given["last"])
        caches = [given[name] for name in self._dropped or self._committed]
        for value in (self._feed, self._guess):
            if value is not None:
                found = lookup(value.op).body(*operands, *caches, run_on=self._engine.run, at=at, **dict(value.attrs))
        (ids, *rest), nodes = found
        drawn = rest[: len(rest) - len(caches)]
        return ids, nodes, Drafted(self._kind, *drawn) if drawn else None

    def _forward(
        self,
        entries: Sequence[_Entry],
        parts: list[tuple[int, torch.Tensor]],
        ids: torch.Tensor,
        nodes: Tokens,
        states: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and the likeliest tokens of every node, by the entry that is for its row (``parts``), or part by part."""
        if self._run_of.op == "exits":
            operands = (ids, *(states[name] for name in self._committed))
            found = lookup("exits").body(*operands, run_on=self._engine.run, at=nodes, **dict(self._run_of.attrs))
            return found[0], found[1]
        if len(parts) < 2:
            return self._run(entries[parts[0][0] if parts else 0], ids, nodes, states)
        found = []
        for i, index in parts:
            found.append([x.clone() for x in self._run(entries[i], ids[index], nodes.gather(index), states)])
        back = torch.cat([index for _, index in parts]).argsort()
        logits, best = (torch.cat(x)[back] for x in zip(*found, strict=True))
        return logits, best

    def _run(
        self, entry: _Entry, ids: torch.Tensor, nodes: Tokens, states: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(ids)
        if self._arrays.n < n or self._arrays.rows != nodes.rows:
            self._arrays = _Arrays(max(64, 1 << (n - 1).bit_length()), nodes.rows)
        table = entry.table(ids.numpy())
        row = nodes.row.numpy()
        assert nodes.anc is not None
        place = np.arange(n) if nodes.rows == 1 else np.arange(n) - np.searchsorted(row, row)
        self._arrays.place(self._engine.context, row, place, pos=nodes.pos.numpy(), anc=nodes.anc.numpy())
        self._launch(entry.schedule, table, states, nodes.rows)
        return entry.logits[:n], entry.best[:n]

    def _need_room(self, states: Mapping[str, Any], counts: Longs) -> None:
        """Caches are asked only when what they had room for when they were asked last may be used up; evictions make more."""
        if not self._bounded:
            return
        stores, most = [states[name] for name in self._bounded], int(counts.max())
        known, room = self._room
        if known() is not stores[0] or room < most:
            for store in stores:
                store.need_room(torch.from_numpy(counts))
            room = max(most, min(s.segments[s.tail].slots - int(s.len["k"][s.tail].max()) for s in stores))
        self._room = weakref.ref(stores[0]), room - most

    def _accept(self, paths: list[list[int]], states: Mapping[str, Any]) -> None:
        """The accepted nodes of every row join its caches."""
        self._need_room(states, np.array([len(p) for p in paths]))
        row = np.repeat(np.arange(len(paths)), [len(p) for p in paths])
        node = np.array([i for p in paths for i in p], np.int64)
        self._arrays.place(self._engine.context, row, node)
        self._launch(self._commit, self._engine.table(self._commit, [len(row)]), states, len(paths))

    def _launch(self, schedule: abi.Schedule, table: Table, states: Mapping[str, Any], rows: int) -> None:
        engine, context = self._engine, self._engine.context
        described = engine.describe(schedule, states)
        context[abi.THREADS], context[abi.SEQUENCES] = engine.threads, rows
        context[abi.TABLE], context[abi.STATES] = table.words.ctypes.data, described.ctypes.data
        engine.launch(0)
