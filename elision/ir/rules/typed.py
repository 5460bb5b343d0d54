"""Rule *typed* (internal): every value has the type that its op gives now, and every name refers to something."""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import BadInput, IllegalProgram
from elision.ir.op import infer_type
from elision.ir.program import Program
from elision.ir.rules.facts import illegal
from elision.ir.value import Graph


def typed(program: Program) -> Iterator[IllegalProgram]:
    """A pass that changes what a template or an entry gives must rebuild the graphs that call it."""
    for graph in program.graphs().values():
        yield from _graph(program, graph)


def _graph(program: Program, graph: Graph) -> Iterator[IllegalProgram]:
    help = "rebuild the graph with `rewrite`, the round with `round_of`"
    for v in graph.values:
        if v.op in ("input", "item"):
            continue
        if v.op == "param":
            declared = program.params.get(v.attr("name"))
            if declared != v.type:
                because = f"it is {v.type} there, and {declared or 'missing'} in the table of parameters"
                yield illegal("typed", f"the parameter {v.attr('name')!r} has two types", f"param in {graph.name}", because, help)
            continue
        try:
            found = infer_type(v.op, v.args, dict(v.attrs), program.targets)
        except BadInput as err:
            yield illegal(
                "typed", f"{v.op} in {graph.name} has operands that do not fit", f"{v.op} in {graph.name}", str(err), help
            )
            continue
        if found != v.type:
            because = f"it gives {_show(found)} now, and {graph.name} was built for {_show(v.type)}"
            yield illegal("typed", f"{v.op} in {graph.name} has another type", f"{v.attr('target', v.op)}", because, help)


def _show(types: object) -> str:
    return ", ".join(map(str, types)) if isinstance(types, tuple) else str(types)
