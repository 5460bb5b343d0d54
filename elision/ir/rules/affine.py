"""Well-formedness of state: a state value is used up once, and read only before that.

Example: ``a = append(kv, k, v); b = append(kv, k2, v2)`` has two next states of one cache; only one of them can be its storage.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.ops.program import consumes, origin
from elision.ir.rules.view import View
from elision.ir.value import Graph, Value

_HELP = "pass the newest value of the state on: every state operand comes in once, in one chain of values, and goes out once"


def affine(view: View) -> Iterator[IllegalProgram]:
    """Each state value is consumed at most once (an output counts), and read only before; every state input comes out once, and
    in the order of the inputs where a call relies on it."""
    for graph in view.program.graphs().values():
        if any(v.is_state for v in graph.values):
            yield from _uses(graph)
            yield from _outputs(graph, ordered=graph.name in view.program.targets)


def _uses(graph: Graph) -> Iterator[IllegalProgram]:
    index = {v: i for i, v in enumerate(graph.values)}
    taken: dict[Value, list[Value]] = {}
    for v in graph.values:
        if v.is_state and (before := consumes(v)) is not None:
            taken.setdefault(before, []).append(v.args[0] if v.op == "item" else v)
    users = graph.users()
    for state, by in taken.items():
        name = graph.names.get(state, state.op)
        after = graph.outputs.count(state)
        if len(by) + after > 1:
            ops = " and ".join([*(v.op for v in by), *["the output"] * after])
            yield IllegalProgram(
                "affine",
                f"the state {name} is consumed {len(by) + after} times",
                sides=f"{graph.name}: {ops}",
                because="all of them would act on the same storage",
                help=_HELP,
            )
        for user in users[state]:
            if user not in by and index[user] > index[by[0]]:
                yield IllegalProgram(
                    "affine",
                    f"the state {name} is read after it was consumed",
                    sides=f"{graph.name}: {user.op} after {by[0].op}",
                    because=f"{by[0].op} changes the storage, so {user.op} would see the later state",
                    help=f"read before {by[0].op}, or read the state that it gives",
                )


def _outputs(graph: Graph, ordered: bool) -> Iterator[IllegalProgram]:
    inputs = [v for v in graph.inputs if v.is_state]
    begins = [origin(v) for v in graph.outputs if v.is_state]
    back = [v for v in begins if v in inputs]
    for state in inputs:
        if back.count(state) != 1:
            yield IllegalProgram(
                "affine",
                f"the state {graph.names[state]} comes out {back.count(state)} times",
                sides=f"{graph.name}: its outputs",
                because="whoever runs this graph goes on with the state that comes out of it",
                help=_HELP,
            )
    if ordered and set(back) == set(inputs) and back != inputs:
        went, came = (", ".join(graph.names[v] for v in s) for s in (inputs, back))
        yield IllegalProgram(
            "affine",
            f"states go in as {went} and come out as {came}",
            sides=f"{graph.name}: its outputs",
            because="a call matches the states that come out to those that went in by their order",
            help="give the states back in the order of the inputs",
        )
