"""A step in parts: the entries that run some of its layers each, what fills their caches without running them, and its head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.program import Program, Weights, state_inputs
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.passes.calibration import run_score


def blocks(step: Graph) -> list[tuple[int, Value]]:
    """The block calls of a step in order, each with its layer."""
    found = [(v.attr("label").partition(".")[0], v) for v in step.calls()]
    return [(int(n), v) for n, v in found if n.isdigit()]


def stream_before(step: Graph, layer: int) -> Value:
    """The stream before a layer that is there."""
    return next(v for n, v in blocks(step) if n == layer).args[0]


def stream_after(step: Graph) -> Value:
    """The stream after the last layer."""
    last = blocks(step)[-1][1]
    return next((v for v in step.values if v.op == "item" and v.args[0] is last and v.attr("index") == 0), last)


def layer_streams(program: Program, weights: Weights, sequences: list[torch.Tensor]) -> torch.Tensor:
    """The stream of a text before every layer and after the last, ``[layers + 1, tokens, width]``."""
    before: dict[str, torch.Tensor] = {}

    def observe(value: Value, operands: Sequence[Any]) -> None:
        number = str(value.attr("label") or "").partition(".")[0] if value.op == "call" else ""
        if number.isdigit():
            before.setdefault(number, operands[0])

    last, *_ = run_score(program, weights, sequences, observe, blocks=True)
    return torch.stack([*before.values(), last])


def cut(
    program: Program, step: Graph, name: str, x: Value, results: Sequence[Value], written: Iterable[str], by: str,
    idle: Iterable[str] = (),
) -> Graph:  # fmt: skip
    """An entry that computes some values of ``step`` from one that takes the place of its operand (``x``: a value of the step, or
    that operand itself) and its states, of which it gives back those ``written`` as the step leaves them. After these come the
    states ``idle``, which pass by."""
    states = state_inputs(step)
    after = dict(zip(states, [v for v in step.outputs if v.is_state], strict=True))
    written = set(written)
    wanted = [*results, *(after[n] if n in written else v for n, v in states.items())]
    needed: set[Value] = set()
    stack = list(wanted)
    while stack:
        value = stack.pop()
        if value not in needed and value is not x:
            needed.add(value)
            stack += value.args
    if any(v.op == "input" and not v.is_state for v in needed):
        raise BadInput(f"{by}: layers of {program.name} read more than the stream, so it cannot be cut")
    b = Builder(name, program.targets)
    known: dict[Value, Value] = {x: b.input(step.names[x] if x.op == "input" else "h", x.tensor)}
    known |= {v: b.input(n, program.states[n]) for n, v in states.items()}
    for value in step.values:
        if value not in needed or value in known:
            continue
        if value.op == "param":
            known[value] = b.param(value.attr("name"), value.tensor)
        elif value.op == "item":
            known[value] = b.items(known[value.args[0]])[value.attr("index")]
        else:
            args = [known[a] for a in value.args]
            known[value] = b.add_with(value.op, args, dict(value.attrs), None, step.names.get(value))
    return b.build(*(known[v] for v in wanted), *(b.input(n, program.states[n]) for n in idle))


def filling(program: Program, name: str, layers: Iterable[int]) -> Graph:
    """An entry that appends to the caches of some layers what these would of the stream given, and computes nothing else."""
    step, layers = program.entries["step"], set(layers)
    calls = [v for layer, v in blocks(step) if layer in layers and any(a.is_state for a in v.args)]
    targets = {t: _appending(program, t) for t in dict.fromkeys(v.attr("target") for v in calls)}
    b = Builder(name, program.targets)
    h = b.input("h", stream_after(step).tensor)
    known = {v: b.input(n, program.states[n]) for n, v in state_inputs(step).items()}
    newest = dict(known)
    for call in calls:
        operands = [h if a is call.args[0] else known[a] if a in known else b.param(a.attr("name"), a.tensor) for a in call.args]
        found = b.add_with("call", operands, {**dict(call.attrs), "target": targets[call.attr("target")]}, None)
        results = b.items(found) if isinstance(found.type, tuple) else [found]
        newest.update(zip([a for a in call.args if a.is_state], results, strict=True))
    return b.build(*newest.values())


def _appending(program: Program, name: str) -> str:
    """The template that appends to the caches what template ``name`` would, and computes nothing else."""
    graph, new = program.templates[name], f"{name}_fill"
    if new not in program.templates:
        states = tuple(v for v in graph.outputs if v.is_state)
        program.templates[new] = rewrite(replace(graph, name=new, outputs=states), lambda b, v, args: None, program.targets)
    return new
