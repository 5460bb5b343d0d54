"""Pointwise operators of a captured graph as scalar expressions (see `elision.ir.expr`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from elision.frontend.normalise import operator_name
from elision.ir.expr import number

_EXPRESSIONS: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "pow": "{0} ** {1}",
    "square": "{0} ** 2",
    **{
        name: f"{name}({{0}})"
        for name in (
            *("exp", "log", "log1p", "sqrt", "rsqrt", "tanh", "erf", "sin", "cos", "abs", "floor"),
            *("sigmoid", "relu", "silu", "softplus"),
        )
    },
}


def expression(node: fx.Node, text: Callable[[fx.Node], str | None]) -> str | None:
    """The operator's expression over ``text`` of its operands, numbers written in; None if it is not pointwise, or has
    arguments that the expression cannot say."""
    name = operator_name(node).removeprefix("aten::")
    operands: list[str] = []
    for arg in node.args:
        part = _operand(arg, text)
        if part is None:
            return None
        operands.append(f"({part})")
    kwargs = {k: v for k, v in node.kwargs.items() if not (k == "alpha" and v == 1)}
    if name == "gelu" and len(operands) == 1 and set(kwargs) <= {"approximate"}:
        return f"{'gelu_tanh' if kwargs.get('approximate') == 'tanh' else 'gelu'}({operands[0]})"
    if kwargs:
        return None
    if name == "clamp":
        return _clamp(operands)
    form = _EXPRESSIONS.get(name)
    return form.format(*operands) if form is not None and f"{{{len(operands)}}}" not in form and len(operands) <= 2 else None


def _operand(arg: Any, text: Callable[[fx.Node], str | None]) -> str | None:
    if isinstance(arg, fx.Node):
        return text(arg)
    if isinstance(arg, int | float) and not isinstance(arg, bool):
        return number(arg)
    return "None" if arg is None else None


def _clamp(operands: list[str]) -> str | None:
    x, low, high = (*operands, "(None)", "(None)")[:3]
    x = x if low == "(None)" else f"maximum({x}, {low})"
    return x if high == "(None)" else f"minimum({x}, {high})"
