"""The fusion plan: which values of a flat graph are computed together, and where.

A region has one anchor. For linears that is the products of one ``x`` with one or several weights, with the `map` that alone
reads them as the epilogue: SwiGLU, bias, residual and softcap cost no pass of their own. Everything else is a region by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from elision.ir.expr import canonical
from elision.ir.types import Tensor
from elision.ir.value import Graph, Value


@dataclass(frozen=True)
class Products:
    """``result = expr(x weights.., extras..)``: operand i of the expression is a product for i < len(weights).
    ``a8``: that attribute of the linears."""

    result: Value
    x: Value
    weights: tuple[Value, ...]
    expr: str
    extras: tuple[Value, ...]
    a8: int = 0


Region = Products | Value
LINEAR = frozenset(("a8", "splits"))  # attributes of a linear that products have


def regions(graph: Graph) -> list[Region]:
    """The regions in an order that can be executed. Values that depend on positions alone come first."""
    users = graph.users()
    first = _of_positions(graph)
    fused: dict[Value, Products] = {}
    taken: set[Value] = set()
    for value in graph.values:
        if value.op == "map" and (found := _epilogue(value, users, set(graph.outputs))):
            fused[value] = found
            taken.update(a for a in value.args if _joins(a, found.x, found.a8) and users[a] == [value])
    whole = _whole_numbers(graph, first)
    rank = {v: 0 if v in whole else 1 if v in first else 2 for v in graph.values}
    ordered = sorted(graph.values, key=rank.__getitem__)
    found_regions: list[Region] = []
    for value in ordered:
        if value.op in ("input", "param") or value in taken:
            continue
        if value in fused:
            found_regions.append(fused[value])
        elif value.op == "linear":
            found_regions.append(alone(value))
        else:
            found_regions.append(value)
    return found_regions


#: Ops that look at no more than which tokens there are. The host runs them before native code starts.
OF_TOKENS = ("positions", "last", "first", "extended", "ones")
#: Ops that make an axis of what the caller gives; the host runs them first of all.
OF_INPUTS = ("patches",)


def _of_positions(graph: Graph) -> set[Value]:
    """Values that follow from the positions of the tokens alone."""
    found: set[Value] = set()
    known = {v.tensor.tokens for v in graph.inputs if isinstance(v.type, Tensor)}  # axes that do not depend on what is computed
    for value in graph.values:
        plain = value.op in ("map", "view", "slice") and value.args and all(a in found for a in value.args)
        begins = value.op in OF_TOKENS and value.args[0].tensor.tokens in known
        if begins or (value.op in OF_INPUTS and value.args[0].op == "input"):
            known.add(value.tensor.tokens)
        if begins or plain:
            found.add(value)
    return found


def _whole_numbers(graph: Graph, of_positions: set[Value]) -> set[Value]:
    """Values of positions that are, or are made of, whole numbers: these have no kernels, so the host computes them at once,
    before the first row."""
    found = {v for v in graph.values if v.op in OF_INPUTS and v.args[0].op == "input"}
    for value in graph.values:
        if value not in of_positions:
            continue
        begins = value.op in OF_TOKENS
        whole = value.tensor.dtype != "f32" or any(a.tensor.dtype != "f32" for a in value.args)
        if begins or (whole and all(a in found for a in value.args)):
            found.add(value)
    return found


def alone(value: Value) -> Products:
    """A product with its bias, and nothing after it."""
    x, weight, *bias = value.args
    return Products(value, x, (weight,), "x0 + x1" if bias else "x0", tuple(bias), value.attr("a8", 0))


def _joins(value: Value, x: Value, a8: int) -> bool:
    """Whether this is a product with x of the same kind."""
    return value.op == "linear" and value.args[0] is x and value.attr("a8", 0) == a8 and {n for n, _ in value.attrs} <= LINEAR


def _epilogue(value: Value, users: dict[Value, list[Value]], outputs: set[Value]) -> Products | None:
    """The linears that a `map` alone reads, of one x, with the map's expression over their products."""
    if value.attr("dtype") is not None or len(value.tensor.axes) != 2:
        return None
    candidates = [
        a
        for a in value.args
        if a.op == "linear" and users[a] == [value] and a.type == value.type and a not in outputs
    ]
    if not candidates:
        return None
    x, a8 = candidates[-1].args[0], candidates[-1].attr("a8", 0)
    products = [a for a in candidates if _joins(a, x, a8)]
    biases = [a.args[2] for a in products if len(a.args) > 2]
    others = [a for a in value.args if a not in products]
    if not all(isinstance(a.type, Tensor) and a.tensor.axes in (value.tensor.axes, value.tensor.axes[1:]) for a in others):
        return None
    extras = tuple(dict.fromkeys([*others, *biases]))
    names: list[str] = []
    for a in value.args:
        if a in products:
            term = f"x{products.index(a)}"
            names.append(f"({term} + x{len(products) + extras.index(a.args[2])})" if len(a.args) > 2 else term)
        else:
            names.append(f"x{len(products) + extras.index(a)}")
    expr = canonical(re.sub(r"\bx(\d+)\b", lambda m: names[int(m[1])], value.attr("expr")))
    return Products(value, x, tuple(a.args[1] for a in products), expr, extras, a8)
