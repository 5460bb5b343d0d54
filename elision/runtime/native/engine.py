"""Running entries natively: tokens and states become a context, the table is walked, what has no kernel runs here in between."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from elision.ir import schedule as abi
from elision.ir.flatten import decoding, flat_entries
from elision.ir.interp import Native, operand
from elision.ir.nodes import nodes_of
from elision.ir.op import lookup
from elision.ir.ops.program import origin
from elision.ir.program import Program, steps
from elision.ir.states import KV, Budget
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.types import NAMES, Tensor
from elision.ir.value import Graph, Value
from elision.runtime.native.orc import load
from elision.runtime.native.pool import pool
from elision.runtime.native.rounds import Round, has_form
from elision.runtime.native.table import Table
from elision.runtime.native.weights import PackedWeights

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forked() -> None:
    for engine in _engines:
        engine.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class Engine:
    """The native entries of a program. Calls of one engine take turns: they share the memory of activations."""

    def __init__(self, program: Program, native: abi.NativeCode, weights: PackedWeights, threads: int) -> None:
        self.program, self.schedules, self.weights, self.threads = program, native.schedules, weights, threads
        self._code = load(native.code)
        names = {r.kernel for s in self.schedules.values() for r in s.rows if r.kernel}
        self._kernels = {name: self._code.address(name) for name in names}
        self._graphs = {name: graph for name, graph in flat_entries(program).items() if name in self.schedules}
        self._outputs = {name: list(_outputs(graph, self.schedules[name])) for name, graph in self._graphs.items()}
        self._tables: dict[str, Table] = {}
        self._caches: dict[str, dict[str, KVStore]] = {}
        self._described: dict[str, tuple[list[tuple[weakref.ref[KVStore], int]], np.ndarray[Any, np.dtype[np.int64]]]] = {}
        self._context = np.zeros(abi.CONTEXT_WORDS, np.int64)
        self.lock = threading.RLock()
        _engines.add(self)

    def after_fork(self) -> None:
        """In the child nobody holds the lock."""
        self.lock = threading.RLock()

    def run(self, entry: str, args: Sequence[Any], at: Tokens) -> tuple[Any, ...]:
        """The outputs of an entry for its inputs in order (tensors on the axis ``at``, then caches)."""
        graph, schedule = self._graphs[entry], self.schedules[entry]
        states = {n: s for n, s in zip((graph.names[v] for v in graph.inputs), args, strict=True) if isinstance(s, KVStore)}
        if states and not at.drafted:
            need_room(states.values(), torch.bincount(at.row, minlength=at.rows))
        with self.lock:
            run = _Run(self, schedule, graph.values, states, at)
            for buffer, given in zip(schedule.inputs, (a for a in args if isinstance(a, torch.Tensor)), strict=True):
                run.give(buffer, given)
            run.all()
            return tuple(run.tensor(place).clone() if place else states[name] for place, name in self._outputs[entry])

    def commit(self, states: Sequence[KVStore], paths: Sequence[Sequence[int]]) -> None:
        """The accepted nodes of every row join all caches (`commit` of the IR); Scratch is empty afterwards."""
        stores = dict(zip(self.schedules["commit"].states, states, strict=True))
        row = torch.tensor([r for r, p in enumerate(paths) for _ in p], dtype=torch.int64)
        node = torch.tensor([i for p in paths for i in p], dtype=torch.int64)
        need_room(states, torch.tensor([len(p) for p in paths]))
        with self.lock:
            run = _Run(self, self.schedules["commit"], (), stores, Tokens(row, node, len(paths)))
            run.set_axis(0, row, node=node)
            run.all()

    def tick(self, graph: Graph, args: Sequence[Any], at: Tokens) -> tuple[Any, ...]:
        """Evict from the caches of the sequences ``at``, as a graph of the clock says."""
        states = {graph.names[v]: s for v, s in zip(graph.inputs, args, strict=True) if v.is_state}
        with self.lock:
            _Run(self, self.schedules[graph.name], (), states, at).all()
        return tuple(states[graph.names[origin(v)]] for v in graph.outputs)

    def natives(self) -> dict[str, Native]:
        """What the interpreter runs in the place of entries."""
        decoded = {decoding(name) for name in steps(self.program)}
        found: dict[str, Native] = {name: partial(self.run, name) for name in self._graphs if name not in decoded}
        found |= {t.graph.name: partial(self.tick, t.graph) for t in self.program.ticks if t.graph.name in self.schedules}
        graph = self.program.round
        if graph is not None and "step" in self._graphs and has_form(graph, self.schedules):
            found[graph.name] = Round(self, graph)
        return found

    def describe(self, schedule: abi.Schedule, states: Mapping[str, KVStore]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The descriptors of a schedule's states. Those of the last call are kept: a cache stays where it is."""
        stores = [states[name] for name in schedule.states]
        known = self._described.get(schedule.entry)
        if known is None or any(ref() is not s or moved != s.moved for (ref, moved), s in zip(known[0], stores, strict=True)):
            lines = np.zeros((len(stores), abi.STATE_WORDS), np.int64)
            for line, store in zip(lines, stores, strict=True):
                _describe(line, store)
            known = self._described[schedule.entry] = ([(weakref.ref(s), s.moved) for s in stores], lines)
        return known[1]

    def table(self, schedule: abi.Schedule, counts: Sequence[int]) -> Table:
        """The table of an entry with room for ``counts`` tokens on its axes."""
        found = self._tables.get(schedule.entry)
        if found is None or any(have < want for have, want in zip(found.capacity, counts, strict=True)):
            room = [_room(n) for n in counts]
            self._tables.pop(schedule.entry, None)
            found = Table(schedule, room, self.threads, self._kernels.__getitem__, self.weights.address)
            self._tables[schedule.entry] = found
        return found

    def caches(self, schedule: abi.Schedule, values: Sequence[Value], longest: int, rows: int) -> dict[str, KVStore]:
        """The caches of a call of an entry, empty, for ``rows`` sequences of up to ``longest`` tokens. They are kept: kernels
        leave their lengths at 0."""
        kept = self._caches.setdefault(schedule.entry, {})
        for name, (index, axis) in schedule.caches.items():
            have = kept.get(name)
            if axis >= 0 and (have is None or have.rows < rows or have.capacity < longest):
                type = values[index].type
                assert isinstance(type, KV)
                room = max(_room(longest), have.capacity if have else 0)
                kept[name] = KVStore(type, max(rows, have.rows if have else 0), room, torch.float32)
        return kept

    def launch(self, start: int) -> int:
        return pool(self.threads, self._code).run(self._context.ctypes.data, start)

    @property
    def context(self) -> Any:
        return self._context


class _Run:
    """One call: its context, its axes, and its values on the host."""

    def __init__(
        self, engine: Engine, schedule: abi.Schedule, values: Sequence[Value], states: Mapping[str, KVStore], at: Tokens
    ) -> None:
        self._engine, self._schedule, self._values, self._states = engine, schedule, values, dict(states)
        self._axes: dict[int, Tokens] = {0: at}
        self._counts: dict[int, int] = {}
        self._early: dict[int, torch.Tensor] = {}  # buffers that were given before there is a table
        self._table: Table | None = None
        self._kept: list[Any] = []  # what the context points to
        context = engine.context
        context[abi.THREADS], context[abi.SEQUENCES] = engine.threads, at.rows
        self.set_axis(0, at.row, at)

    def set_axis(self, index: int, row: torch.Tensor, at: Tokens | None = None, node: torch.Tensor | None = None) -> None:
        """Describe an axis to native code."""
        arrays = {"row": row}
        if at is not None:
            arrays["pos"] = at.pos
            if at.anc is not None:
                arrays |= {"anc": at.anc, "node": nodes_of(at)}
            else:  # without a prompt that it is part of, this call is all there is
                end = torch.searchsorted(row, row, right=True)
                arrays["ahead"] = end - 1 - torch.arange(len(row)) if at.ahead is None else at.ahead
        if node is not None:
            arrays["node"] = node
        arrays["start"] = torch.searchsorted(row, torch.arange(self._axes[0].rows + 1))
        base = abi.AXES + abi.AXIS_WORDS * index
        self._engine.context[base] = self._counts[index] = len(row)
        for name, array in arrays.items():
            self._point(base + abi.AXIS[name], array)

    def _point(self, word: int, array: torch.Tensor) -> None:
        array = array.contiguous()
        self._kept.append(array)
        self._engine.context[word] = array.data_ptr()

    def give(self, buffer: int, value: torch.Tensor) -> None:
        self._early[buffer] = value

    def tensor(self, place: tuple[Any, ...]) -> torch.Tensor:
        assert self._table is not None
        return self._table.view(place, self._counts[place[6]])

    def all(self) -> None:
        """Run every row: those of the host here, the others natively."""
        rows = self._schedule.rows
        i = 0
        while i < len(rows) and rows[i].host >= 0:
            self._host(rows[i])
            i += 1
        self._bind()
        while i < len(rows):
            if rows[i].host >= 0:
                self._host(rows[i])
                i += 1
            else:
                i = self._engine.launch(i)

    def _bind(self) -> None:
        most = max(self._counts.values())  # of axes that depend on what is computed: tokens are only ever taken away
        counts = [self._counts.get(i, most) for i in range(len(self._schedule.axes))]
        if self._schedule.caches:
            longest = max(_longest(at) for at in self._axes.values())
            self._states |= self._engine.caches(self._schedule, self._values, longest, self._axes[0].rows)
        table = self._table = self._engine.table(self._schedule, counts)
        context = self._engine.context
        context[abi.TABLE] = table.words.ctypes.data
        described = self._engine.describe(self._schedule, self._states)
        self._kept.append(described)
        context[abi.STATES] = described.ctypes.data
        for buffer, value in self._early.items():
            b = self._schedule.buffers[buffer]
            if b.slot >= 0:
                shape = tuple(value.shape[1:])
                place = ("view", buffer, 0, value[:1].contiguous().stride()[1:], shape, NAMES[value.dtype], b.axis)
                table.view(place, len(value)).copy_(value)

    def _host(self, row: abi.Row) -> None:
        """Compute one value by its op's body, on the memory that native code uses."""
        value = self._values[row.host]
        op, (_, args), (_, results) = lookup(value.op), *row.operands
        kwargs: dict[str, Any] = dict(value.attrs)
        if op.wants_at:
            kwargs["at"] = self._axes[next(a[-1] for a in args if a[0] in ("view", "axis"))]
        found = op.body(*map(self._operand, args), **kwargs)
        if op.makes_axis:
            found, tokens = found
            axis = results[0][6]
            self._axes[axis] = tokens
            self.set_axis(axis, tokens.row, tokens)
            if found.dtype == torch.int64:
                self._point(abi.AXES + abi.AXIS_WORDS * axis + abi.AXIS["index"], found)
        parts = found if isinstance(value.type, tuple) else (found,)
        for place, part in zip(results, parts, strict=True):
            if place[0] == "state":
                self._states[place[1]] = part
            elif place[0] == "view":
                if self._table is None:
                    self._early[place[1]] = part
                else:
                    self.tensor(place).copy_(part)

    def _operand(self, place: tuple[Any, ...]) -> Any:
        kind, name, *_ = place
        if kind == "weight":
            return operand(self._engine.weights[name], self._engine.program.params[name])
        if kind == "state":
            return self._states[name]
        if kind == "axis":
            return torch.empty(self._counts[name], 0)
        if self._table is not None:
            return self.tensor(place)
        whole, offset, strides, shape = self._early[name].contiguous(), *place[2:5]
        return whole.as_strided((len(whole), *shape), (whole[:1].numel(), *strides), whole.storage_offset() + offset)


def _longest(at: Tokens) -> int:
    """The most tokens of a sequence."""
    return int(torch.bincount(at.row).max()) if len(at) else 1


def _room(count: int) -> int:
    """For how many tokens there is room made that ``count`` ask for: few sizes, so that memory is seldom made anew."""
    return 1 << max(0, count - 1).bit_length() if count <= 1024 else -(-count // 512) * 512


def need_room(stores: Iterable[KVStore], counts: torch.Tensor) -> None:
    """Every cache must have room for ``counts [B]`` more entries of the sequences."""
    for store in stores:
        if isinstance(store.type.main[-1].slots, Budget):
            store.need_room(counts)


def _outputs(graph: Graph, schedule: abi.Schedule) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Where each output of an entry is, or the name of the state that it is a version of."""
    places = iter(schedule.outputs)
    for value in graph.outputs:
        if isinstance(value.type, Tensor):
            yield next(places), ""
        else:
            yield (), graph.names[origin(value)]


def _describe(line: np.ndarray[Any, np.dtype[np.int64]], store: KVStore) -> None:
    """The words of a cache's descriptor (`elision.ir.schedule.STATE`)."""
    at, parts = abi.STATE, {"": store.segments[store.tail], "draft_": store.segments[-1]}
    if store.tail:
        parts["older_"] = store.segments[0]
        line[at["older_len_k"]], line[at["older_len_v"]] = (store.len[what][0].data_ptr() for what in "kv")
        keys = parts["older_"].planes["k"].arrays
        line[at["older_k_groups"]] = keys["scale"].shape[2] if "scale" in keys else 0
    for prefix, rows in parts.items():
        for what in ("k", "v"):
            for name, array in rows.planes[what].arrays.items():
                key = f"{prefix}{what}" + ("" if name == "codes" else f"_{name}")
                if key in at:
                    line[at[key]] = array.data_ptr()
        line[at[f"{prefix}blocks"]] = rows.planes["k"].arrays["codes"].shape[2]
    for name, array in (("pos", store.pos), ("len_k", store.len["k"][-1]), ("len_v", store.len["v"][-1])):
        line[at[name]] = array.data_ptr()
    line[at["entries"]], line[at["sequences"]] = store.pos.shape[-1], store.rows
    if "node_pos" in store.index:
        line[at["node_pos"]], line[at["node_live"]] = store.index["node_pos"].data_ptr(), store.index["node_live"].data_ptr()
        line[at["nodes"]] = store.index["node_pos"].shape[1]
    if store.type.scores is not None:
        line[at["depth"]] = store.type.scores.depth
        for name in ("score", "waiting", "waiting_nodes", "waiting_norm", "prompt", "local"):
            if name in store.index:
                line[at[name]] = store.index[name].data_ptr()
    if store.type.summary is not None:
        line[at["summary"]], line[at["pages"]] = store.index["summary"].data_ptr(), store.index["summary"].shape[2]

