"""What passes that run fewer layers for some tokens share: the weights that a step reads, and steps without some layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from elision.errors import BadInput, IllegalProgram
from elision.ir.cost import cost
from elision.ir.op import Sizes
from elision.ir.program import Program, bypassing, running, state_inputs, steps
from elision.ir.states import KV, Present
from elision.ir.value import Builder, Graph, Value, rewrite


def kept_for(program: Program, speedup: float, by: str) -> float:
    """How many of the layers stay, on average over the tokens, if a decode step is to read ``speedup`` times fewer bytes of
    weights: the rest of the model (the head above all) stays. Raises BadInput for what leaving out layers cannot give."""
    entry = "step" if "step" in program.entries else "score"
    layers, rest = dict.fromkeys(program.layers, 0.0), 0.0
    for row in cost(program, entry, Sizes(tokens=1)):
        number = row.label.partition(".")[0]
        if number.isdigit() and int(number) in layers:
            layers[int(number)] += row.weight_bytes
        else:
            rest += row.weight_bytes
    whole = sum(layers.values())
    most = (whole + rest) / (rest + min(layers.values(), default=0.0)) if layers else 1.0
    if not 1 <= speedup <= most + 1e-9:
        raise BadInput(f"{by}: speedup={speedup}; expected 1 to {most:.2f}, which one layer and what is not in layers allow")
    return len(layers) * ((whole + rest) / speedup - rest) / whole if layers else 0.0


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


def declare(program: Program, caches: Collection[str], present: str, by: str) -> None:
    """Say of caches that some positions do not exist in them."""
    for name in caches:
        type = program.states[name]
        if not isinstance(type, KV) or type.present.kind != "all" or type.scores is not None:
            raise IllegalProgram(
                "validity",
                f"{name} is to be {present}, and it is {type}",
                sides=by,
                because="it leaves out tokens already, or counts what every token gives",
                help="apply one of these methods",
            )
        keyed_by = "explicit" if present == "masked" else type.keyed_by
        program.states[name] = replace(type, present=Present(present), keyed_by=keyed_by)

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        named = v.op == "input" and v.is_state and v.attr("name") in caches
        return b.input(v.attr("name"), program.states[v.attr("name")]) if named else None

    program.rewrite(rule, *(name for name in program.entries if name != "score"))
    program.ticks = tuple(replace(t, graph=rewrite(t.graph, rule, program.targets)) for t in program.ticks)
