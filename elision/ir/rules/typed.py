"""Well-formedness of types: every value has the type that its op gives now, and every parameter that of the program's table.

Example: a pass makes ``step`` give other logits and leaves the round, which calls it, as it was. Nothing in the round says so:
its values still have the types that it was built with.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import BadInput, IllegalProgram
from elision.ir.op import infer_type
from elision.ir.rules.view import View
from elision.ir.value import Graph, Value

_HELP = "rebuild the graph with `rewrite` (the round with `round_of`) after a change of what it calls"


def typed(view: View) -> Iterator[IllegalProgram]:
    """Infers every type again, as the parser does when it reads the program back."""
    for graph in view.program.graphs().values():
        for value in graph.values:
            because = _parameter(view, value) if value.op == "param" else _result(view, value)
            if because:
                yield _illegal(graph, value, because)


def _parameter(view: View, value: Value) -> str:
    declared = view.program.params.get(value.attr("name"))
    if declared == value.type:
        return ""
    return f"the program declares {declared or 'no such parameter'}, the graph reads {value.type}"


def _result(view: View, value: Value) -> str:
    if value.op in ("input", "item"):
        return ""
    try:
        found = infer_type(value.op, value.args, dict(value.attrs), view.program.targets)
    except BadInput as err:
        return str(err)
    return "" if found == value.type else f"it gives {_shown(found)} now, and the graph was built for {_shown(value.type)}"


def _illegal(graph: Graph, value: Value, because: str) -> IllegalProgram:
    name = repr(value.attr("name")) if value.op == "param" else f"of {value.attr('target')}" if value.attr("target") else ""
    op = f"{value.op} {name}".strip()
    what = f"{op} has another type in {graph.name}"
    return IllegalProgram("typed", what, sides=f"{graph.name}: {op}", because=because, help=_HELP)


def _shown(types: object) -> str:
    return ", ".join(map(str, types)) if isinstance(types, tuple) else str(types)
