"""A program: templates, the entries that run them as a stream of blocks, states, and the round that generates.

Entries share one raised graph: ``prefill`` (committed tokens, logits of each row's last), ``step`` (drafted tokens, all logits)
and ``score`` (the model's own forward). ``round`` is generation itself; ``ticks`` run on the clock; ``edits`` say, one after the
other, which tokens of a prompt the model is to read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.drafting.growth import growth_of
from elision.ir.states import KV, StateType
from elision.ir.types import Axis, Host, Tensor
from elision.ir.value import Builder, Graph, Rule, Value, rewrite
from elision.ir.weights import WeightEncoding

QUALITIES = ("exact", "distribution", "approximate")


@dataclass(frozen=True)
class Tick:
    """Run ``graph`` for the sequences whose committed position is 0 mod ``every`` (0: not while decoding), and once after
    prefill; with ``chunks`` also after every part of a prompt."""

    every: int
    graph: Graph
    chunks: bool = False


@dataclass
class Program:
    """``params`` are the types of the weights; ``meta`` holds plain facts of the model (``vocab``, ``positions``,
    ``hidden`` ...).

    ``stored``: by parameter, the encoding in which the model's file has the weight, for passes that keep it; known while
    compiling only, hence not printed; so is ``models``, which opens another compiled model. ``applied`` is the text of the
    passes so far, ``quality`` the join of theirs.
    """

    name: str
    params: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, StateType] = field(default_factory=dict)
    templates: dict[str, Graph] = field(default_factory=dict)
    entries: dict[str, Graph] = field(default_factory=dict)
    round: Graph | None = None
    ticks: tuple[Tick, ...] = ()
    edits: tuple[Graph, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    applied: tuple[str, ...] = ()
    quality: str = "exact"
    stored: Mapping[str, WeightEncoding] = field(default_factory=dict, compare=False)
    models: Callable[[str], tuple[Program, Weights]] | None = field(default=None, compare=False)

    def copy(self) -> Program:
        """A program that can be changed without changing this one (graphs are immutable and shared)."""
        return replace(
            self,
            params=dict(self.params),
            states=dict(self.states),
            templates=dict(self.templates),
            entries=dict(self.entries),
            meta=dict(self.meta),
        )

    @property
    def targets(self) -> dict[str, Graph]:
        """What a `call` can name: templates and entries."""
        return {**self.templates, **self.entries}

    def graphs(self) -> dict[str, Graph]:
        """Every graph by name: templates, entries, the round, the ticks, the edits."""
        found = dict(self.targets)
        if self.round is not None:
            found[self.round.name] = self.round
        found.update({g.name: g for g in (*(t.graph for t in self.ticks), *self.edits)})
        return found

    def rewrite(self, rule: Rule, *entries: str) -> None:
        """Rewrite the named entries (all of them if none is named) in place."""
        for name in entries or tuple(self.entries):
            self.entries[name] = rewrite(self.entries[name], rule, self.targets)

    @property
    def layers(self) -> dict[int, Layer]:
        """The layers of the stream that are left, by their index in the raised model."""
        labels = {v.attr("label") for g in self.entries.values() for v in g.calls()}
        indices = {int(m[1]) for label in labels if (m := re.match(r"(\d+)\.", label))}
        return {i: Layer(self, i) for i in sorted(indices)}

    def drop_unused(self) -> None:
        """Leave out states, parameters and templates that no entry uses any more."""
        used = {v.attr("name") for g in self.graphs().values() for v in g.values if v.op == "param"}
        self.params = {n: t for n, t in self.params.items() if n in used}
        called = {v.attr("target") for g in self.graphs().values() for v in g.values if v.attr("target")}
        self.templates = {n: g for n, g in self.templates.items() if n in called}
        taken = {n for g in self.entries.values() for v in g.inputs if v.is_state for n in [g.names[v]] if _used(g, v)}
        gone = set(self.states) - taken - {g.names[v] for t in self.ticks for g in [t.graph] for v in g.inputs if v.is_state}
        self.states = {n: t for n, t in self.states.items() if n not in gone}
        for name, graph in self.entries.items():
            self.entries[name] = without_states(graph, gone, self.targets)
        if self.round is not None:
            self.round = round_of(self, *drafting(self.round))


@dataclass(frozen=True)
class Layer:
    """The i-th layer of the stream, with halves ``attn`` and ``mlp`` (a parallel-residual family has one part, ``block``)."""

    program: Program
    index: int

    @property
    def parts(self) -> list[str]:
        found: list[str] = []
        for graph in self.program.entries.values():
            for v in graph.calls():
                number, _, part = v.attr("label").partition(".")
                if number == str(self.index) and part not in found:
                    found.append(part)
        return found

    def bypass(self, part: str | None = None) -> None:
        """Leave the layer (or one of its parts) out of every entry: the stream passes by, its states are gone."""
        if part is not None and part not in self.parts:
            raise BadInput(f"layer {self.index} has no half {part!r}; it has {', '.join(self.parts)}")
        labels = {f"{self.index}.{p}" for p in self.parts if part in (None, p)}

        self.program.rewrite(bypassing(labels))
        self.program.drop_unused()


def bypassing(labels: Container[str]) -> Rule:
    """The rewrite that leaves out the blocks with these labels: the stream and their states pass by."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
        if v.op != "call" or v.attr("label") not in labels:
            return None
        results = v.type if isinstance(v.type, tuple) else (v.type,)
        if sum(isinstance(t, Tensor) for t in results) > 1:
            raise BadInput(f"block {v.attr('label')} gives what later ones read besides the stream, so it cannot be left out")
        return (args[0], *(a for a in args if a.is_state)) if isinstance(v.type, tuple) else args[0]

    return rule


def _used(graph: Graph, state: Value) -> bool:
    return any(state in v.args for v in graph.values)


def without_states(graph: Graph, names: set[str], targets: Mapping[str, Graph]) -> Graph:
    """The entry without the inputs of those names and the outputs that only pass them through."""
    if not any(graph.names.get(v) in names for v in graph.inputs):
        return graph
    gone = {v for v in graph.inputs if graph.names[v] in names}
    outputs = tuple(v for v in graph.outputs if v not in gone)
    trimmed = Graph(graph.name, tuple(v for v in graph.inputs if v not in gone), graph.values, outputs, graph.names)
    kept = tuple(v for v in graph.values if v not in gone)
    return rewrite(replace(trimmed, values=kept), lambda b, v, a: None, targets)


def vocabulary(graph: Graph, ids: Value) -> int:
    """How many different ids an input of the graph can have: the rows of the smallest table that is read by them; 0 for one
    that is no index of a table."""
    rows = [v.args[1].tensor.axes[0] for v in graph.values if v.op == "embed" and v.args[0] is ids]
    return min((n for n in rows if isinstance(n, int)), default=0)


def state_inputs(graph: Graph) -> dict[str, Value]:
    """The states that an entry takes, by name."""
    return {graph.names[v]: v for v in graph.inputs if v.is_state}


def committed_states(program: Program) -> list[str]:
    """The states that the round commits, in order; without a round all caches."""
    from elision.ir.ops.program import origin  # ops are written in terms of programs, hence not at import

    graph = program.round
    if graph is None:
        return [name for name, type in program.states.items() if isinstance(type, KV)]
    return [graph.names[origin(v)] for v in graph.values if v.op == "commit"]


def drafting(round: Graph) -> tuple[int, tuple[str, ...]]:
    """The most nodes of a round's trees, and its drafters as text."""
    draft = next((v for v in round.values if v.op in ("draft", "guess")), None)
    depth = max((v.attr("depth") for v in round.values if v.op == "checkpoint"), default=1)
    return (depth, draft.attr("methods")) if draft is not None else (1, ())


#: What runs the nodes of a round.
FORWARD = ("call", "staged", "routed", "exits")


def running(round: Graph) -> Value:
    """The value of a round that runs its nodes: a `call` of ``step``, or what stands in its place."""
    return next(v for v in round.values if v.op in FORWARD)


def steps(program: Program) -> tuple[str, ...]:
    """The entries that a round runs its nodes with; those of `exits` are ``part_..``, ``fill_..`` or ``late_..``,
    and ``head``."""
    if program.round is None:
        return tuple(name for name in program.entries if name == "step")
    value = running(program.round)
    return value.attr("targets") or (value.attr("target"),)


def answers(program: Program) -> tuple[str, ...]:
    """Those of `steps` that give logits."""
    return tuple(name for name in steps(program) if name.partition("_")[0] in ("step", "head"))


def guesses(program: Program) -> tuple[str, ...]:
    """The entries with which a model drafts: ``draft``, or ``draft_..`` where there are several."""
    return tuple(name for name in program.entries if name.partition("_")[0] == "draft")


def round_of(
    program: Program, depth: int = 1, methods: tuple[str, ...] = (), run: tuple[str, Mapping[str, Any]] | None = None
) -> Graph:
    """The generation program: checkpoint, draft, step over the tree, verify, commit, learn, emit. Without ``methods`` the draft
    is empty: the tree is its root. ``methods``: the drafters as text; ``depth``: the most nodes of a tree; ``run``: the op that
    runs the nodes, with its attributes (that of the program's round, or a `call` of ``step``).

    Drafts come from tables (`draft`), or from a model if the program has entries for it (`guesses`). One with caches of its own
    has an entry ``feed`` too, which takes committed tokens: these caches are fed before the round and keep nothing of it."""
    step, targets = program.entries["step"], guesses(program)
    if run is None:
        now = None if program.round is None else running(program.round)
        run = ("call", {"target": "step"}) if now is None else (now.op, dict(now.attrs))
    growth = growth_of(methods[0]) if methods and targets else None
    b = Builder("round", program.targets)
    last = b.input("last", Tensor((Axis("b"),), "i64"))
    requests = b.input("requests", Host("requests"))
    drafts = [b.input("drafts", Host("drafts"))] if methods else []
    states = [b.input(n, program.states[n]) for n in state_inputs(step)]
    own = [b.input(n, program.states[n]) for n in state_inputs(program.entries["feed"])] if "feed" in program.entries else []
    drawn, kind = [], None
    if own:
        fed, *own = b.add("feed", requests, *drafts, last, *own, targets=("feed",))
        drafts = [b.named(fed, "fed")]
    own = [b.add("checkpoint", s, depth=depth, name="mark") for s in own]
    marked = [b.add("checkpoint", s, depth=depth, name="mark") for s in states]
    if not drafts:
        ids = b.add("root", last, axis="d", name="ids")
    elif growth is None:
        ids = b.add("draft", last, requests, *drafts, axis="d", methods=methods, name="ids")
    else:
        kind, rest = growth.kind, own or marked
        ids, *found = b.add("guess", requests, *drafts, last, *rest, targets=targets, axis="d", methods=methods, kind=kind)
        b.named(ids, "ids")
        drawn, rest = found[: len(found) - len(rest)], found[len(found) - len(rest) :]
        own, marked = (rest, marked) if own else ([], rest)
    logits, best, *written = b.add(run[0], *([requests] if run[0] == "routed" else []), ids, *marked, **run[1])
    rule = {} if kind is None or growth is None else {"kind": kind, "rule": growth.rule}
    paths, nxt = b.add("verify", ids, b.named(logits, "logits"), b.named(best, "best"), requests, last, *drawn, **rule)
    b.named(paths, "paths")
    b.named(nxt, "next")
    done = [b.add("commit", s, paths, name="done") for s in written]
    dropped = [b.add("drop", s, name="dropped") for s in own]
    tokens = b.add("emit", ids, paths, nxt, name="tokens")
    learnt = [b.add("learn", d, ids, best, paths, name="learnt") for d in drafts]
    return b.build(tokens, nxt, *done, *dropped, *learnt)


Weights = Mapping[str, torch.Tensor]
