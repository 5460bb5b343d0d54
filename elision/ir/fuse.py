"""Pointwise ops that follow one another become one `map`."""

from __future__ import annotations

import re

from elision.ir.expr import canonical
from elision.ir.value import Builder, Graph, Value, rewrite


def fuse_maps(graph: Graph) -> Graph:
    """Write a `map` that only one other `map` reads into that one: SwiGLU is ``silu(x0) * x1``, not two ops.

    Only maps that keep the dtype are fused, so that no rounding is lost.
    """
    users = graph.users()
    inner = {
        v
        for v in graph.values
        if v.op == "map" and v.attr("dtype") is None and [u.op for u in users[v]] == ["map"] and v not in graph.outputs
    }

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op != "map" or v.attr("dtype") is not None:
            return None
        operands: list[Value] = []
        parts: list[str] = []
        for old, new in zip(v.args, args, strict=True):
            if old in inner and new.op == "map" and new.tensor == v.tensor:
                parts.append(f"({_renamed(new.attr('expr'), [_place(operands, a) for a in new.args])})")
            else:
                parts.append(f"x{_place(operands, new)}")
        expr = canonical(re.sub(r"\bx(\d+)\b", lambda m: parts[int(m[1])], v.attr("expr")))
        found = b.add("map", *operands, expr=expr, name=graph.names[v])
        assert isinstance(found, Value)
        return found

    return rewrite(rewrite(graph, rule), lambda b, v, a: None)


def _place(operands: list[Value], value: Value) -> int:
    if value not in operands:
        operands.append(value)
    return operands.index(value)


def _renamed(expr: str, places: list[int]) -> str:
    return re.sub(r"\bx(\d+)\b", lambda m: f"x{places[int(m[1])]}", expr)
