"""An entry as one flat graph: every call replaced by its template's values, every `Env` by what the block supplies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elision.ir.program import Program, steps
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Env, Graph, Value, rewrite


def decoding(step: str) -> str:
    """The name of the `committed` form of a step, which a round without drafts runs natively, with nothing to commit after it:
    ``decode`` of ``step``, ``decode_1`` of ``step_1``."""
    return "decode" + step.removeprefix("step")


def flat_entries(program: Program) -> dict[str, Graph]:
    """What is compiled to native code, flat: the program's entries (but a ``step`` that the round runs in parts), and `committed`
    beside steps."""
    order = ("step", "prefill", "score")  # the first that needs a weight says how it is packed
    left = {"step"} - {*steps(program)} if "step" in program.entries else set()
    wanted = [name for name in program.entries if name not in left]
    names = sorted(wanted, key=lambda n: order.index(n) if n in order else len(order))
    found = {name: flatten(program, name) for name in names}
    for name in steps(program):
        if name.startswith("step"):
            found[decoding(name)] = committed(found[name])
    return found


def committed(step: Graph) -> Graph:
    """A step over tokens that are committed already: they join the caches at once. For roots of trees, which are accepted
    whatever else is, that is `step` and then `commit` of the root."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op == "observe":
            return b.add_with("observe", args, {**dict(v.attrs), "decoding": True}, None, step.names.get(v))
        if v.op != "input" or not isinstance(v.type, Tensor):
            return None
        axes = [Axis(d.name) if isinstance(d, Axis) else d for d in v.type.axes]
        return b.input(v.attr("name"), v.type.with_axes(*axes))

    return replace(rewrite(step, rule), name=decoding(step.name))


def flatten(program: Program, entry: str) -> Graph:
    """The entry without calls. Values of different blocks that are equal are one value."""
    graph = program.entries[entry]
    builder = Builder(entry, program.targets)
    known: dict[Value, Any] = {}
    for value in graph.inputs:
        assert not isinstance(value.type, tuple)
        known[value] = builder.input(graph.names[value], value.type)
    _inline(builder, program, graph, known, {})
    return builder.build(*(known[v] for v in graph.outputs))


def _inline(builder: Builder, program: Program, graph: Graph, known: dict[Value, Any], env: dict[str, Any]) -> None:
    """Add a graph's values to the builder; ``known`` maps its inputs, and then all its values."""
    for value in graph.values:
        if value in known or value.op == "param":
            continue
        for weight in value.args:  # where they are first used, so that the order is that of a program read back from text
            if weight.op == "param" and weight not in known:
                known[weight] = builder.param(weight.attr("name"), weight.tensor)
        if value.op == "item":
            known[value] = known[value.args[0]][value.attr("index")]
        elif value.op == "call":
            target = program.targets[value.attr("target")]
            inner = dict(zip(target.inputs, (known[a] for a in value.args), strict=True))
            _inline(builder, program, target, inner, dict(value.attr("env") or ()))
            results = tuple(inner[v] for v in target.outputs)
            known[value] = results if isinstance(value.type, tuple) else results[0]
        else:
            attrs = {k: env[a.name] if isinstance(a, Env) else a for k, a in value.attrs}
            found = builder.add_with(value.op, [known[a] for a in value.args], attrs, None, graph.names.get(value))
            known[value] = tuple(builder.items(found)) if isinstance(found.type, tuple) else found
