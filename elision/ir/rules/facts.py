"""What the rules look at: every op of a program where it runs, with the states, axes and attributes that it really has.

A template is written once and called by many blocks, on committed or on drafted tokens, with one state or another. `Facts`
follows every call from the entries, the round and the ticks, so that a rule sees sites and not templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from elision.errors import BadInput, IllegalProgram
from elision.ir.op import bind_axes, substitute
from elision.ir.ops.program import origin
from elision.ir.program import Program, Tick
from elision.ir.states import KV, StateType
from elision.ir.types import Axis, Tensor
from elision.ir.value import Env, Graph, Value

EVICTIONS = ("select", "flush", "recode")  # ops that change committed entries of a cache
RUNS = ("call", "when", "repeat")  # ops that run another graph


@dataclass(frozen=True)
class Kernels:
    """What a target's kernels can do; by default what the reference interpreter can. ``results``: optional results of `attend`;
    ``keep``: how sets of kept entries may differ."""

    results: frozenset[str] = frozenset({"lse", "mass"})
    keep: frozenset[str] = frozenset({"shared", "per_layer", "per_head"})


@dataclass(frozen=True)
class Site:
    """One op in one place. ``root``: the entry, round or tick; ``via``: the calls that lead here; ``args``: its operands,
    followed through the calls to where they were made; ``names``: the program's state of each state operand (``""`` for a local one)."""

    value: Value
    root: str
    via: tuple[Value, ...]
    args: tuple[Value, ...]
    names: tuple[str, ...]
    states: tuple[StateType, ...]
    axes: Mapping[Axis, Axis]
    env: Mapping[str, Any]

    @property
    def op(self) -> str:
        return self.value.op

    @property
    def label(self) -> str:
        """The block's label, or the name of the innermost graph, or nothing at the root."""
        labels = [v.attr("label") for v in self.via if v.attr("label")]
        return str(labels[-1]) if labels else str(self.via[-1].attr("target")) if self.via else ""

    @property
    def name(self) -> str:
        """The first state operand's name."""
        return self.names[0] or "a local state"

    @property
    def state(self) -> StateType:
        """The first state operand's type."""
        return self.states[0]

    @property
    def axis(self) -> Axis:
        """The token axis that the op runs on: that of its first operand with tokens."""
        return next(axis for a in self.value.args if (axis := self.axis_of(a)) is not None)

    def axis_of(self, value: Value) -> Axis | None:
        """The token axis of a value of this site's graph."""
        tokens = value.type.tokens if isinstance(value.type, Tensor) else None
        return None if tokens is None else substitute(tokens, self.axes)

    def attr(self, name: str, default: Any = None) -> Any:
        """An attribute, with what the block supplies."""
        found = self.value.attr(name, default)
        return self.env.get(found.name, found) if isinstance(found, Env) else found

    def __str__(self) -> str:
        return f"{self.op} in {self.root}{f' at {self.label}' if self.label else ''}"


@dataclass
class Facts:
    """The sites of a program, in the order in which they run."""

    program: Program
    kernels: Kernels = Kernels()
    entries: dict[str, list[Site]] = field(init=False)
    round: list[Site] = field(init=False)
    ticks: list[tuple[Tick, list[Site]]] = field(init=False)

    def __post_init__(self) -> None:
        self.entries = {name: list(sites(self.program, g)) for name, g in self.program.entries.items()}
        self.round = list(sites(self.program, self.program.round)) if self.program.round is not None else []
        self.ticks = [(t, list(sites(self.program, t.graph))) for t in self.program.ticks]

    def all(self, *ops: str) -> Iterator[Site]:
        """Every site of these ops (of any op if none is named)."""
        for found in (*self.entries.values(), self.round, *(s for _, s in self.ticks)):
            yield from (s for s in found if not ops or s.op in ops)

    @property
    def depth(self) -> int:
        """The most tokens that a round can take back; 1 in plain decoding, 0 without a round."""
        return max((s.value.attr("depth") for s in self.round if s.op == "checkpoint"), default=0)


def sites(program: Program, graph: Graph) -> Iterator[Site]:
    """Every op of a graph and of the graphs that it runs."""
    frame = _Frame(graph.name, (), {v: v for v in graph.inputs}, {v: graph.names[v] for v in graph.inputs if v.is_state}, {}, {})
    return _walk(program, program.targets, graph, frame)


@dataclass(frozen=True)
class _Frame:
    root: str
    via: tuple[Value, ...]
    actual: Mapping[Value, Value]
    names: Mapping[Value, str]
    axes: Mapping[Axis, Axis]
    env: Mapping[str, Any]


def _walk(program: Program, targets: Mapping[str, Graph], graph: Graph, frame: _Frame) -> Iterator[Site]:
    for v in graph.values:
        if v.op in ("input", "param", "item"):
            continue
        args = tuple(frame.actual.get(a, a) for a in v.args)
        held = [a for a in v.args if a.is_state]
        names = tuple(frame.names.get(origin(a), "") for a in held)
        states = tuple(program.states.get(n, a.type) for n, a in zip(names, held, strict=True))
        yield Site(v, frame.root, frame.via, args, names, states, frame.axes, frame.env)  # type: ignore[arg-type]
        if v.op not in RUNS:
            continue
        inner = targets[v.attr("target")]
        skip = len(v.args) - len(inner.inputs)  # a `when` has its condition first
        actual = dict(zip(inner.inputs, args[skip:], strict=True))
        named = dict(zip((i for i in inner.inputs if i.is_state), names, strict=True))
        bound = bind_axes([i.type for i in inner.inputs], [a.type for a in v.args[skip:]])
        axes = {formal: substitute(axis, frame.axes) for formal, axis in bound.items()}
        env = {k: frame.env.get(e.name, e) if isinstance(e, Env) else e for k, e in v.attr("env", ())}
        yield from _walk(program, targets, inner, _Frame(frame.root, (*frame.via, v), actual, named, axes, env))


def illegal(rule: str, what: str, sides: Any, because: str, help: str) -> IllegalProgram:
    """The finding of a rule; ``sides`` are the sites or types that do not go together."""
    return IllegalProgram(rule, what, sides=str(sides), because=because, help=help)


def cache(site: Site) -> KV:
    """The first state operand's type, for ops on caches."""
    if not isinstance(site.state, KV):
        raise BadInput(f"{site}: expected a KV cache, got {site.state}")
    return site.state
