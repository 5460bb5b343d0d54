"""What passes that run fewer layers for some tokens share: what a step costs, and steps without some layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from elision.errors import BadInput, IllegalProgram
from elision.ir.cost import StepCost, cost
from elision.ir.op import Sizes
from elision.ir.program import Program, bypassing, running, state_inputs, steps
from elision.ir.states import KV, Present, StateType
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.passes.layers.skip_layers import leave_out
from elision.passes.timing import Clock


def step_bytes(program: Program) -> StepCost:
    """The bytes of weights that a decode step reads."""
    entry = "step" if "step" in program.entries else "score"
    numbers = {str(i) for i in program.layers}
    rows = [(row.label.partition(".")[0] in numbers, row.weight_bytes) for row in cost(program, entry, Sizes(tokens=1))]
    whole, rest = (sum(moved for inside, moved in rows if inside is which) for which in (True, False))
    return StepCost(rest, whole / max(len(numbers), 1))


def gains(program: Program, speedup: float, by: str, step: StepCost, context: float = 0.0) -> None:
    """Raises BadInput for a speed-up that leaving out layers cannot give."""
    most = step(len(program.layers), context) / step(min(len(program.layers), 1), context)
    if not 1 <= speedup <= most * (1 + 1e-9):
        raise BadInput(f"{by}: speedup={speedup}; expected 1 to {most:.2f}, which one layer and what is not in layers allow")


def evenly(layers: int, count: int) -> list[int]:
    """Of so many layers the ``count`` (at least one) that stay if these are spread evenly, the first and the last among them
    (one: the last)."""
    if count >= layers:
        return list(range(layers))
    return [layers - 1] if count <= 1 else [round(i * (layers - 1) / (count - 1)) for i in range(count)]


def step_seconds(program: Program, clock: Clock, contexts: Sequence[int]) -> StepCost:
    """The seconds of a step with ``contexts`` tokens before it, one or more: the line through the times of the program and of one
    with half of its layers, evenly spaced."""
    there = list(program.layers)
    half = {there[i] for i in evenly(len(there), len(there) // 2)}
    part = program.copy()
    leave_out(part, [i for i in there if i not in half], "", "skip-layers")
    seconds = np.array(clock((program, part), contexts))
    layers, before = (x.ravel() for x in np.meshgrid((len(there), len(half)), contexts, indexing="ij"))
    terms = np.stack((np.ones(len(layers)), layers, *([layers * before] if len(set(contexts)) > 1 else [])), axis=1)
    found = np.linalg.lstsq(terms, seconds.ravel(), rcond=None)[0]
    return StepCost(*(max(0.0, float(x)) for x in found))  # noise may not make a term a gain


def decodes(program: Program, by: str) -> None:
    """Raises BadInput where there is no round, and IllegalProgram (rule validity) where one runs less than ``step`` already."""
    if program.round is None:
        raise BadInput(f"{by}: {program.name} does not generate (it has no round), so there is no depth to choose")
    if (op := running(program.round).op) != "call":
        raise IllegalProgram(
            "validity",
            f"the round runs {op} of {', '.join(steps(program))}, in the place of step",
            sides=by,
            because="what one method leaves out the other would run, or fill with what it did not compute",
            help="apply one method that chooses the depth",
        )


def without(program: Program, step: Graph, layers: Collection[int], name: str) -> Graph:
    """A step that leaves out some layers; their states pass by."""
    labels = {f"{i}.{part}" for i in layers for part in program.layers[i].parts}
    return rewrite(replace(step, name=name), bypassing(labels), program.targets)


def caches_of(program: Program, layer: int) -> set[str]:
    """The names of the caches that a layer of the step appends to."""
    step = program.entries["step"]
    names = {v: name for name, v in state_inputs(step).items()}
    calls = [v for v in step.calls() if v.attr("label").partition(".")[0] == str(layer)]
    return {names[a] for v in calls for a in v.args if a in names}


def _in_the_way(type: StateType, present: str) -> str:
    """Why a cache cannot be declared to be without some positions; nothing if it can."""
    if not isinstance(type, KV):
        return "is no cache of keys and values"
    if type.present.kind != "all":
        return f"leaves out tokens already ({type.present.kind})"
    if type.scores is not None:
        return "has scores, which count what every token gives"
    if present == "masked" and len(type.main) > 1:
        return "moves whole blocks of entries on the clock, for which every token must have added one"
    return "is read by pages of entries side by side" if type.summary is not None and present == "masked" else ""


def declare(program: Program, caches: Collection[str], present: str, by: str) -> None:
    """Say of caches that some positions do not exist in them."""
    for name in caches:
        type = program.states[name]
        why = _in_the_way(type, present)
        if why or not isinstance(type, KV):
            raise IllegalProgram(
                "validity",
                f"{name} is to be without some tokens in some layers, and it {why}",
                sides=by,
                because="what it keeps or counts is said of every token",
                help="apply one of these methods",
            )
        keyed_by = "explicit" if present == "masked" else type.keyed_by
        program.states[name] = replace(type, present=Present(present), keyed_by=keyed_by)

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        named = v.op == "input" and v.is_state and v.attr("name") in caches
        return b.input(v.attr("name"), program.states[v.attr("name")]) if named else None

    program.rewrite(rule, *(name for name in program.entries if name != "score"))
    program.ticks = tuple(replace(t, graph=rewrite(t.graph, rule, program.targets)) for t in program.ticks)
