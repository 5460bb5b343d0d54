"""The reference interpreter: runs graphs op by op with the ops' bodies, on the real storage layouts.

A graph is planned once (bodies looked up, arguments turned into slots) and run many times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from elision.ir.op import bind_axes, lookup, substitute
from elision.ir.program import Program, Weights
from elision.ir.states import KV
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES, Axis, Tensor
from elision.ir.value import Env, Graph, Value
from elision.ir.walk import made_axis
from elision.ir.weights import Encoded

Axes = dict[Axis, Tokens]

#: A faster form of a graph: its outputs from its operands in order and the tokens of its first axis.
Native = Callable[[Sequence[Any], Tokens], tuple[Any, ...]]
#: A faster form of all commits of a round: takes the states and the paths.
NativeCommit = Callable[[Sequence[Any], Any], None]
#: Is shown every op before it runs: its value in its graph, and its operands.
Observe = Callable[[Value, Sequence[Any]], None]


@dataclass(frozen=True)
class _Target:
    """The graph that a `call` or its kin runs, planned (or given natively), and which of the caller's axes each of its own
    stands for."""

    plan: _Plan | Native
    axes: Mapping[Axis, Axis]


@dataclass(frozen=True)
class _Step:
    """One op of a plan: which slots it reads, where its result goes, and what the body needs besides."""

    value: Value
    body: Any
    args: tuple[int, ...]
    out: tuple[int, ...]
    kwargs: dict[str, Any]
    at: Axis | None
    makes: Axis | None
    target: _Target | None
    own: Mapping[str, _Target]  # what the op runs on tokens of its own
    dead: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    size: int
    weights: tuple[tuple[int, str, Tensor], ...]
    steps: tuple[_Step, ...]
    outputs: tuple[int, ...]


class Interpreter:
    """Runs the graphs of one program with its weights. Holds no state of a run: safe to use from several threads.

    ``natives``: by name of a graph, what runs in its place; ``commit``: what commits the caches of a round; ``observe``: is shown
    every op of what the interpreter runs itself, in order, a call before what it calls. ``cache``: makes the caches of a run, of
    a type, for so many sequences of so many tokens, where they are not those of the host (`elision.ir.store`).
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        natives: Mapping[str, Native] | None = None,
        commit: NativeCommit | None = None,
        observe: Observe | None = None,
        cache: Callable[[KV, int, int], Any] | None = None,
    ) -> None:
        self.program, self.weights, self.natives, self._commit = program, weights, natives or {}, commit
        self._observe, self.cache = observe, cache
        self._targets = program.targets
        self._plans: dict[tuple[int, str], _Plan] = {}
        self._graphs: list[Graph] = []  # keeps graphs alive while their id is a key

    def run(
        self, graph: Graph, inputs: Mapping[str, Any], axes: Mapping[str, Tokens], env: Mapping[str, Any] | None = None
    ) -> tuple[Any, ...]:
        """The outputs of a graph for ``inputs`` by name; ``axes`` gives the tokens of each input axis by the axis's name."""
        bound: Axes = {}
        for value in graph.inputs:
            if isinstance(value.type, Tensor):
                bound.update({d: axes[d.name] for d in value.type.axes if isinstance(d, Axis) and d.name in axes})
        args = [inputs[graph.names[v]] for v in graph.inputs]
        if graph.name in self.natives:
            return self.natives[graph.name](args, next(iter(bound.values())))
        return self._execute(self._plan(graph, env or {}), args, bound)

    def _execute(self, plan: _Plan, inputs: Sequence[Any], axes: Axes) -> tuple[Any, ...]:
        slots: list[Any] = [None] * plan.size
        slots[: len(inputs)] = inputs
        for slot, name, type in plan.weights:
            slots[slot] = operand(self.weights[name], type)
        for step in plan.steps:
            args = [slots[i] for i in step.args]
            if self._observe is not None:
                self._observe(step.value, args)
            if step.own:
                at = {} if step.at is None else {"at": axes[step.at]}
                result = step.body(*args, run_on=partial(self._run_on, step.own), **at, **step.kwargs)
            elif step.target is not None:
                result = step.body(*args, run=partial(self._run_target, step.target, axes), **step.kwargs)
            elif step.at is not None:
                result = step.body(*args, at=axes[step.at], **step.kwargs)
            else:
                result = step.body(*args, **step.kwargs)
            if step.makes is not None:
                result, axes[step.makes] = result
            if len(step.out) == 1:
                slots[step.out[0]] = result
            else:
                for slot, part in zip(step.out, result, strict=True):
                    slots[slot] = part
            for slot in step.dead:
                slots[slot] = None
        return tuple(slots[i] for i in plan.outputs)

    def _run_target(self, target: _Target, axes: Axes, args: Sequence[Any]) -> tuple[Any, ...]:
        """What `call` and its kin use to run their target on the caller's axes; axes that it makes join the caller's."""
        inner: Axes = {formal: axes[actual] for formal, actual in target.axes.items() if actual in axes}
        if not isinstance(target.plan, _Plan):
            return target.plan(args, next(iter(inner.values())))
        known = set(inner)
        found = self._execute(target.plan, args, inner)
        for axis in inner.keys() - known:
            axes[substitute(axis, target.axes)] = inner[axis]
        return found

    def _run_on(self, targets: Mapping[str, _Target], name: str, args: Sequence[Any], at: Tokens) -> tuple[Any, ...]:
        """What an op uses to run one of its targets on tokens that it has made itself."""
        return self._run_target(targets[name], dict.fromkeys(targets[name].axes, at), args)

    def _plan(self, graph: Graph, env: Mapping[str, Any]) -> _Plan:
        key = (id(graph), repr(sorted(env.items())) if env else "")
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = _make_plan(graph, env, self._target, self._commit)
            self._graphs.append(graph)
        return found

    def _target(self, value: Value, name: str, env: Mapping[str, Any]) -> _Target:
        graph = self._targets[name]
        if lookup(value.op).runs_on:
            axis = graph.inputs[0].tensor.tokens
            assert axis is not None
            return _Target(self.natives.get(graph.name) or self._plan(graph, env), {axis: axis})
        given = value.args[len(value.args) - len(graph.inputs) :]  # `when` takes its condition before them
        axes = bind_axes([v.type for v in graph.inputs], [a.type for a in given])
        return _Target(self.natives.get(graph.name) or self._plan(graph, env), axes)


def _make_plan(
    graph: Graph,
    env: Mapping[str, Any],
    target: Callable[[Value, str, Mapping[str, Any]], _Target],
    commit: NativeCommit | None = None,
) -> _Plan:
    slot: dict[Value, int] = {v: i for i, v in enumerate(graph.inputs)}
    for v in graph.values:
        if not isinstance(v.type, tuple):
            slot.setdefault(v, slot[v.args[0]] if _passes_by(v) else len(slot))
    parts: dict[Value, list[int]] = {}
    for v in graph.values:
        if v.op == "item":
            parts.setdefault(v.args[0], []).append(slot[v])
    last: dict[int, Value] = {}
    for v in graph.values:
        for a in v.args:
            if a in slot and v.op != "item":
                last[slot[a]] = v
    keep = {slot[v] for v in graph.outputs}
    weights = tuple((slot[v], v.attr("name"), v.tensor) for v in graph.values if v.op == "param")
    steps: list[_Step] = []
    for v in graph.values:
        if v.op in ("input", "param", "item") or _passes_by(v):
            continue
        op = lookup(v.op)
        out = tuple(parts[v]) if isinstance(v.type, tuple) else (slot[v],)
        kwargs = {k: env[a.name] if isinstance(a, Env) else a for k, a in v.attrs}
        at = _first_axis(v) if op.wants_at else None
        made = made_axis(v)
        dead = tuple(i for i in {slot[a] for a in v.args if a in slot} if last.get(i) is v and i not in keep)
        inner = target(v, v.attr("target"), dict(kwargs.get("env", ()))) if op.runs else None
        own = {name: target(v, name, {}) for name in v.attr("targets")} if op.runs_on else {}
        args = tuple(slot[a] for a in v.args)
        if v.op == "commit" and commit is not None:
            before = steps[-1] if steps else None
            if before is not None and before.body is _commit and before.args[-1] == args[-1]:  # all states in one call
                args, out, dead = (*before.args[:-1], *args), (*before.out, *out), (*before.dead, *dead)
                steps.pop()
            steps.append(_Step(v, _commit, args, out, {"native": commit}, None, None, None, {}, dead))
            continue
        steps.append(_Step(v, op.body, args, out, kwargs, at, made, inner, own, dead))
    return _Plan(len(slot), weights, tuple(steps), tuple(slot[v] for v in graph.outputs))


def _commit(*args: Any, native: NativeCommit) -> Any:
    """Several states of a round committed together."""
    *states, paths = args
    native(states, paths)
    return states[0] if len(states) == 1 else tuple(states)


def operand(weight: torch.Tensor, type: Tensor) -> torch.Tensor | Encoded:
    """A weight as the bodies of ops take it: an encoded one stays so until its op decodes what it needs."""
    return weight if type.encoding is None else Encoded(weight, type.encoding, type.row, DTYPES[type.dtype])


def _passes_by(value: Value) -> bool:
    """A checkpoint of a cache: drafted tokens go to its Scratch, so there is nothing to keep."""
    return value.op == "checkpoint" and isinstance(value.type, KV)


def _first_axis(value: Value) -> Axis:
    for a in value.args:
        if isinstance(a.type, Tensor) and a.type.tokens is not None:
            return a.type.tokens
    raise AssertionError(f"{value.op} has no token axis")


def run_entry(program: Program, weights: Weights, entry: str, ids: torch.Tensor, at: Tokens, states: Mapping[str, Any]) -> Any:
    """One run of an entry over ``ids [n]`` at those tokens: its first output. For tests and checks; a run keeps its
    interpreter."""
    graph = program.entries[entry]
    first = graph.inputs[0]
    axis = first.tensor.tokens
    assert axis is not None
    return Interpreter(program, weights).run(graph, {graph.names[first]: ids, **states}, {axis.name: at})[0]
