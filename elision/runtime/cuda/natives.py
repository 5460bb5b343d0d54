"""A program's graphs on a device, in the place of what the interpreter would run: entries, commits, whole rounds.

A round without drafts is one graph of launches, that of ``decode``, which leaves the next token where the next round reads it.
A round of drafts is ``step`` and ``commit``; the walk through the trees is the device's, and the host reads what was accepted.
Where one drafter has kernels (`elision.runtime.cuda.drafts`), its trees are made and learnt from in the same graph, and that is
all that the host reads; else they come from the host.
Tokens are drawn on the device unless penalties ask for all the tokens before them. Other rounds (early exits, models that draft)
are the interpreter's, with the entries from here.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from elision.ir.drafting.run import DraftRun
from elision.ir.flatten import decoding
from elision.ir.interp import Native
from elision.ir.launch import DRAFTS, need_entry
from elision.ir.op import lookup
from elision.ir.ops.program import origin
from elision.ir.program import committed_states, running
from elision.ir.requests import Requests
from elision.ir.states import KV
from elision.ir.tokens import Tokens
from elision.ir.tree import roots
from elision.ir.value import Graph
from elision.ir.verify import Request
from elision.runtime.cuda.caches import DeviceCache
from elision.runtime.cuda.device import Held
from elision.runtime.cuda.drafts import DeviceDrafts, Tables
from elision.runtime.cuda.engine import Call, Engine

#: What is in a round that runs here: see `elision.ir.program.round_of`.
_FORM = {"call", "checkpoint", "root", "draft", "item", "verify", "commit", "emit", "learn"}
_PATH = 64  # nodes of a tree, at the most


class Natives:
    """What runs on the engine's device. Calls take turns: they share the memory of activations."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._lock = engine, threading.RLock()
        self._tables: Tables | None = None
        self._drafts: weakref.WeakKeyDictionary[DraftRun, DeviceDrafts] = weakref.WeakKeyDictionary()
        self._items: dict[int, list[Request]] = {}  # by number of sequences, how the device was told to draw

    def entries(self) -> dict[str, Native]:
        """By name of a graph, what runs in its place."""
        graph, schedules = self.engine.program.round, self.engine.code.schedules
        found: dict[str, Native] = {n: partial(self.run, n) for n in schedules if n in self.engine.program.entries}
        if "score" in self.engine.program.entries and "score" not in schedules:
            found["score"] = self._refused
        found |= {t.graph.name: partial(self._tick, t.graph) for t in self.engine.program.ticks}
        if graph is not None and {v.op for v in graph.values} - {"input", "param"} <= _FORM:
            found[graph.name] = partial(self._round, graph)
        return found

    def cache(self, type: KV, rows: int, capacity: int) -> DeviceCache:
        """A cache for prompts that come in."""
        return DeviceCache(self.engine.device, type, rows, capacity, None)

    def run(self, entry: str, args: Sequence[Any], at: Tokens) -> tuple[Any, ...]:
        """The outputs of an entry for its inputs in order: tensors come back to the host, caches stay where they are."""
        graph = self.engine.graphs[entry]
        caches = {n: a for n, a in zip((graph.names[v] for v in graph.inputs), args, strict=True) if isinstance(a, DeviceCache)}
        with self._lock:
            if not at.drafted:
                _need_room(caches, np.bincount(at.row.numpy(), minlength=at.rows))
            call = self.engine.call(entry, at, *(a for a in args if isinstance(a, torch.Tensor)))
            self.engine.run(call, caches)
            places = iter(range(len(call.schedule.outputs)))
            return tuple(
                caches[graph.names[origin(v)]] if v.is_state else self.engine.output(call, next(places)) for v in graph.outputs
            )

    def _refused(self, args: Sequence[Any], at: Tokens) -> tuple[Any, ...]:
        """The model's own forward where an op of it has no kernel. Raises BadInput that names it."""
        need_entry(self.engine.program.name, self.engine.code, "score")
        raise AssertionError("score was neither planned nor refused")

    def _tick(self, graph: Graph, args: Sequence[Any], at: Tokens) -> tuple[Any, ...]:
        """Evict from the caches of the sequences ``at``, or encode what is older, as a graph of the clock says."""
        given = {graph.names[v]: a for v, a in zip(graph.inputs, args, strict=True)}
        caches = {name: a for name, a in given.items() if isinstance(a, DeviceCache)}
        if caches:
            with self._lock:
                self._launch(self.engine.call(graph.name, at), caches)
        for value in graph.outputs:
            if value.op == "select":
                caches[graph.names[origin(value)]].evicted(at.row.numpy(), value.args[1].attr("n"))
            elif value.op == "flush":
                caches[graph.names[origin(value)]].flushed(at.row.numpy(), value.attr("n"), value.attr("keep"))
        return tuple(given[graph.names[origin(v)]] for v in graph.outputs)

    def commit(self, states: Sequence[DeviceCache], paths: Sequence[Sequence[int]]) -> None:
        """The accepted nodes of every sequence join all caches; Scratch is empty afterwards."""
        names, rows = committed_states(self.engine.program), len(paths)
        path, count = np.full((rows, _PATH), -1), np.array([len(p) for p in paths])
        for line, nodes in zip(path, paths, strict=True):
            line[: len(nodes)] = nodes
        with self._lock:
            for name, array in (("path", path), ("accepted", count)):
                self.engine.device.write(self.engine.round(name, rows), torch.from_numpy(array))
            self._accept(dict(zip(names, states, strict=True)), rows, count)

    def _accept(self, caches: Mapping[str, DeviceCache], rows: int, count: np.ndarray[Any, Any]) -> None:
        """Commit the paths that are on the device."""
        _need_room(caches, count)
        none = torch.zeros(0, dtype=torch.int64)
        self._launch(self.engine.call("commit", Tokens(none, none, rows)), caches)
        for cache in caches.values():
            cache.drop()

    def _launch(self, call: Call, caches: Mapping[str, Held], entries: Sequence[str] = ()) -> None:
        """The launches of a call (`Engine.graph`) as a graph, which is recorded once for caches and numbers of tokens."""
        kept = call.graphs.setdefault(next(iter(caches.values())), {})
        key = (*map(weakref.ref, caches.values()), *call.counts.items(), *call.longest.items())
        if key not in kept:
            kept[key] = self.engine.graph(call, caches, entries)
        kept[key]()

    def _round(self, graph: Graph, args: Sequence[Any], at: Tokens) -> tuple[Any, ...]:
        given = dict(zip((graph.names[v] for v in graph.inputs), args, strict=True))
        requests, drafts, last = given["requests"], given.get("drafts"), given["last"]
        caches = {name: a for name, a in given.items() if isinstance(a, DeviceCache)}
        step = running(graph).attr("target")
        with self._lock:
            if isinstance(drafts, DraftRun) and self._drafts_here(step, drafts, requests, at):
                tokens = self._drafted(step, drafts, requests, last, at, caches)
                return (tokens, torch.tensor([tokens[r][-1] for r in at.row.tolist()]), *caches.values(), drafts)
            if self._tables is not None:
                self._tables.take_home()
        ids, nodes = (last, roots(at)) if drafts is None else drafts.propose(last, requests, at)
        with self._lock:
            start = time.perf_counter()
            if len(ids) == len(last) and decoding(step) in self.engine.code.schedules:
                paths, drawn, best = self._decode(decoding(step), requests, last, at, caches, drafts is not None)
                middle = time.perf_counter()
            else:
                paths, drawn, best, middle = self._verify(step, requests, ids, nodes, caches)
            if drafts is not None:
                drafts.verify_seconds += middle - start
                drafts.commit_seconds += time.perf_counter() - middle
                drafts.learn(ids, best, paths)
        tokens = lookup("emit").body(ids, paths, drawn, at=nodes)
        return (tokens, drawn, *caches.values(), *(() if drafts is None else (drafts,)))

    def _drafts_here(self, entry: str, drafts: DraftRun, requests: Requests, at: Tokens) -> bool:
        """Whether the device makes the trees of a round: it must know the drafter, draw the tokens, and need nothing of the host
        that depends on positions."""
        there = self.engine.code.schedules
        if "propose" not in there or drafts.alone is None or 2 * len(at) > _PATH:
            return False
        known = not any(row.host >= 0 for schedule in there[entry].values() for row in schedule.rows)
        return known and self._asked(requests, at)

    def _drafted(
        self, entry: str, drafts: DraftRun, requests: Requests, last: torch.Tensor, at: Tokens, caches: dict[str, DeviceCache]
    ) -> list[list[int]]:
        """A whole round as one graph: trees, their verification, its commit, and what the drafter learns. The new tokens of every
        sequence."""
        engine, rows, drafter = self.engine, at.row.tolist(), drafts.alone
        assert drafter is not None and drafter.template is not None
        if self._tables is None or self._tables.drafter is not drafter:
            self._tables = Tables(engine.device, drafter)
        if drafts not in self._drafts:
            capacity = next(iter(caches.values())).capacity
            self._drafts[drafts] = DeviceDrafts(engine.device, self._tables, drafter, at.rows, capacity)
        here = self._drafts[drafts]
        n = drafts.ahead(rows, requests, min(_PATH // len(rows), len(drafter.template)) - 1)
        start = time.perf_counter()
        most = np.zeros(at.rows, np.int64)
        most[rows] = 1 + np.minimum(here.begin(rows, requests), n)
        _need_room(caches, most)
        nodes = _blank(rows, n + 1, at.rows)
        call, fed = engine.known(entry, nodes), ("drafted", at.rows, rows, n)
        if call is None or call.fed != fed:
            call = engine.call(entry, nodes, torch.zeros_like(nodes.row))
            call.fed = fed
        self._launch(call, {**caches, DRAFTS: here}, ("propose", entry, "commit", "learn"))
        drafted, new, found = here.end(rows)
        drafts.verify_seconds += time.perf_counter() - start
        tokens: list[list[int]] = [[] for _ in range(at.rows)]
        for r, line in zip(rows, new, strict=True):
            tokens[r] = line
        for cache in caches.values():
            cache.unused(most - [len(line) for line in tokens])
        drafts.made(rows, requests, drafted, [len(line) - 1 for line in new], found, len(nodes))
        return tokens

    def _decode(
        self, entry: str, requests: Requests, last: torch.Tensor, at: Tokens, caches: dict[str, DeviceCache], learns: bool
    ) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
        """One token of each sequence. What the last round left on the device is not written again."""
        counts = np.bincount(at.row.numpy(), minlength=at.rows)
        _need_room(caches, counts)
        here = self._asked(requests, at)
        rows, owner = at.row.tolist(), weakref.ref(next(iter(caches.values())))
        call = self.engine.known(entry, at)
        if call is None or call.fed != (owner, rows, at.pos.tolist(), last.tolist()):
            call = self.engine.call(entry, at, last)
        self._launch(call, caches)
        drawn = self.engine.read_round("next", at.rows)[rows, 0]
        if call.feeds:
            call.fed = (owner, rows, (at.pos + 1).tolist(), drawn.tolist())
        paths = [[0] if n else [] for n in counts.tolist()]
        if not here:
            paths, drawn = requests.verify(last, self.engine.output(call, 0), drawn[:, None], roots(at))
        best = self.engine.output(call, 1) if learns else drawn
        return paths, drawn, best

    def _asked(self, requests: Requests, at: Tokens) -> bool:
        """Tell the device how the sequences draw their tokens. Whether it can: what looks at the tokens before (penalties) is the
        host's, tokens that are suppressed at positions that are to come, and other rules than `match`."""
        if not all(_without_host(requests.items[r], len(requests.histories[r])) for r in set(at.row.tolist())):
            return False
        if self._items.get(at.rows) != requests.items:
            self._items[at.rows] = list(requests.items)
            warps = [(q, q.warp) for q in requests.items]
            numbers = [(0.0 if q.greedy else w.temperature, w.top_p, w.min_p) for q, w in warps]
            whole = [(w.top_k, (q.seed + (1 << 63)) % (1 << 64) - (1 << 63), q.row & 0xFFFFFFFF) for q, w in warps]
            for name, array in (("numbers", torch.tensor(numbers)), ("whole", torch.tensor(whole))):
                self.engine.device.write(self.engine.round(name, at.rows), array)
        return True

    def _verify(
        self, entry: str, requests: Requests, ids: torch.Tensor, nodes: Tokens, caches: dict[str, DeviceCache]
    ) -> tuple[list[list[int]], torch.Tensor, torch.Tensor, float]:
        """Trees of drafts: what is accepted, the next tokens, the likeliest token of every node, and when that was known."""
        engine, rows = self.engine, nodes.rows
        here, there = self._asked(requests, nodes), sorted(set(nodes.row.tolist()))
        call = engine.call(entry, nodes, ids)
        self._launch(call, caches)
        best = engine.output(call, 1)
        if here:
            count = engine.read_round("accepted", rows)[:, 0]
            self._accept(caches, rows, count.numpy())
            path, drawn = engine.read_round("path", rows), engine.read_round("next", rows)[there, 0]
            middle = time.perf_counter()
            return [p[:n].tolist() for p, n in zip(path, count.tolist(), strict=True)], drawn, best, middle
        paths, drawn = requests.verify(ids, engine.output(call, 0), best, nodes)
        middle = time.perf_counter()
        self.commit([caches[n] for n in committed_states(engine.program)], paths)
        return paths, drawn, best, middle


def _blank(rows: Sequence[int], nodes: int, sequences: int) -> Tokens:
    """So many nodes of each sequence, whose places in trees are not known to the host."""
    node = torch.arange(nodes).repeat(len(rows))
    row = torch.repeat_interleave(torch.tensor(rows), nodes)
    return Tokens(row, torch.zeros_like(row), sequences, node - 1, torch.ones_like(row) << node)


def _without_host(q: Request, position: int) -> bool:
    """Whether tokens from a position on are drawn by numbers that the device is told."""
    suppressed = q.warp.suppress and position < q.warp.suppress_before
    return (q.greedy or q.rule == "match") and q.warp.repetition_penalty == 1.0 and not suppressed


def _need_room(caches: Mapping[str, DeviceCache], counts: np.ndarray[Any, Any]) -> None:
    for cache in caches.values():
        cache.need_room(counts)
