"""Every op that a run of a graph reaches, through calls, with what its operands stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from elision.ir.op import bind_axes, lookup, substitute, substitute_type
from elision.ir.ops.program import consumes, origin
from elision.ir.program import Program
from elision.ir.states import KV, Array
from elision.ir.types import Axis, Tensor
from elision.ir.value import Env, Graph, Types, Value

#: Ops that run another graph on their last operands, and ops that only mark where a round begins and ends.
CONTROL = ("call", "when", "repeat", "staged", "routed", "exits", "feed", "guess")
MARKS = ("checkpoint", "commit", "drop")


@dataclass(frozen=True, eq=False)
class Frame:
    """One run of a graph: ``given`` are the caller's values of its inputs, ``axes`` the outermost axis of each of its own,
    ``guarded`` says that it runs under a `when`, ``times`` how often it runs."""

    graph: Graph
    parent: Frame | None = None
    given: Mapping[Value, Value] = field(default_factory=dict)
    axes: Mapping[Axis, Axis] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    guarded: bool = False
    times: int = 1

    def source(self, value: Value) -> tuple[Frame, Value]:
        """Where an operand begins: the entry's input, a parameter, `fresh`, `empty`, or the op that made the tensor."""
        begin = origin(value) if value.is_state else value
        if begin.op == "input" and self.parent is not None:
            return self.parent.source(self.given[begin])
        return self, begin

    def inside(self, value: Value, target: Graph) -> Frame:
        """The run of ``target`` by a `call`, `when` or `repeat` of this graph."""
        args = value.args[len(value.args) - len(target.inputs) :]
        own = lookup(value.op).runs_on  # on tokens of its own: the target's axis stands for itself
        bound = {} if own else bind_axes([v.type for v in target.inputs], [a.type for a in args])
        axes = {formal: substitute(actual, self.axes) for formal, actual in bound.items()}
        return Frame(
            target,
            self,
            dict(zip(target.inputs, args, strict=True)),
            axes,
            dict(value.attr("env", ())),
            value.attr("label") or self.label,
            self.guarded or value.op == "when",
            self.times * value.attr("n", 1) if value.op == "repeat" else self.times,
        )


@dataclass(frozen=True, eq=False)
class Site:
    """One op of a run: ``value`` in the graph of ``frame``; ``top`` is the value of the outermost graph that it runs in."""

    value: Value
    frame: Frame
    top: Value
    root: Graph

    @property
    def where(self) -> str:
        """``step: 0.attn``"""
        return f"{self.root.name}: {self.frame.label}" if self.frame.label else self.root.name

    def attr(self, name: str) -> Any:
        """An attribute, with what the block supplies for an `Env`."""
        found = self.value.attr(name)
        return self.frame.env.get(found.name, found) if isinstance(found, Env) else found

    def state(self, value: Value) -> tuple[str, KV | Array]:
        """The name and type of the state that a state operand belongs to."""
        frame, begin = self.frame.source(value)
        assert isinstance(begin.type, KV | Array)
        return (frame.graph.names[begin] if begin.op == "input" else begin.op), begin.type

    def types(self) -> list[Types]:
        """The types of the operands on the outermost axes."""
        return [self.actual(a) for a in self.value.args]

    def actual(self, value: Value) -> Types:
        if value.is_state:
            return self.frame.source(value)[1].type
        if isinstance(value.type, tuple):
            return tuple(substitute_type(t, self.frame.axes) for t in value.type)
        return substitute_type(value.type, self.frame.axes)

    def axis(self, value: Value) -> Axis | None:
        """The outermost token axis of a tensor operand."""
        found = self.actual(value)
        return found.tokens if isinstance(found, Tensor) else None

    @property
    def changes(self) -> Value | None:
        """The state operand that this op changes, or None: marks, and ops that run a graph, change none themselves."""
        if self.value.op in (*CONTROL, *MARKS) or not self.value.is_state:
            return None
        return consumes(self.value)


def made_axis(value: Value) -> Axis | None:
    """The token axis that an op makes, if it makes one: that of its (first) result."""
    if value.op in ("input", "param", "item") or not lookup(value.op).makes_axis:
        return None
    first = value.type[0] if isinstance(value.type, tuple) else value.type
    return first.tokens if isinstance(first, Tensor) else None


def ran(value: Value) -> tuple[str, ...]:
    """The graphs that an op runs."""
    found: tuple[str, ...] = value.attr("targets", ())
    return found or ((value.attr("target"),) if value.attr("target") else ())


def sites(program: Program, graph: Graph) -> Iterator[Site]:
    """The ops that a run of ``graph`` reaches, in order; a call comes before what it runs."""
    return _sites(program.targets, Frame(graph), None, graph)


def _sites(targets: Mapping[str, Graph], frame: Frame, top: Value | None, root: Graph) -> Iterator[Site]:
    for value in frame.graph.values:
        if value.op in ("input", "param", "item"):
            continue
        yield Site(value, frame, top or value, root)
        if value.op in CONTROL:
            for name in ran(value):
                yield from _sites(targets, frame.inside(value, targets[name]), top or value, root)
