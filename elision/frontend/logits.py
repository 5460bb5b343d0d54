"""From the product of queries and keys to the softmax: what the logits of a written-out attention are.

Logits are ``softcap * tanh(scale * scores / softcap) + bias``, where the bias (mask, ALiBi) does not depend on tokens. Scale
and soft cap are read off the operators on the way. The bias is the same way walked from scores that are zero.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from elision.frontend.capture import Captured
from elision.frontend.evaluate import evaluate
from elision.frontend.normalise import operator_name
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layouts
from elision.frontend.trace import Tracer

#: Operators that multiply queries with keys, or probabilities with values.
PRODUCTS = {"aten::matmul", "aten::bmm", "aten::baddbmm", "aten::einsum"}
#: Operators that only rearrange, repeat or cast.
MOVES = {
    "aten::reshape", "aten::flatten", "aten::unflatten", "aten::unsqueeze", "aten::squeeze", "aten::transpose", "aten::permute",
    "aten::movedim", "aten::swapaxes", "aten::mT", "aten::numpy_T", "aten::expand", "aten::repeat", "aten::repeat_interleave",
    "aten::to", "aten::_to_copy",
}  # fmt: skip
_CASTS = {"aten::to", "aten::_to_copy"}
_ADDITIVE = {"aten::add", "aten::sub", "aten::where", "aten::masked_fill"}
_FLOORS = {"aten::max", "aten::maximum", "aten::clamp", "aten::clamp_min"}
_LOWEST = -1e4  # a logit that is put in the place of a score hides a key; a floor that low changes nothing that shows


@dataclass(frozen=True)
class Logits:
    """``path`` leads from the product ``scores`` to the operand of the softmax. ``softcap`` 0 is none. ``sinks [H]`` are
    logits that were concatenated to those of the keys."""

    scores: fx.Node
    path: tuple[fx.Node, ...]
    scale: float
    softcap: float
    sinks: fx.Node | None


class LogitReader:
    """Reads the logits of softmaxes of a captured graph."""

    def __init__(self, captured: Captured, taint: Taint) -> None:
        self._captured, self._taint = captured, taint

    def read(self, softmax: fx.Node) -> Logits | None:
        """The logits that a softmax is of; None if there is something else on the way."""
        path: list[fx.Node] = []
        node: Any = softmax.args[0]
        while operator_name(node) not in PRODUCTS:
            path.append(node)
            node = self.inner(node)
            if node is None:
                return None
        path.reverse()
        scale, softcap, sinks = float(node.kwargs.get("alpha", 1.0)), 0.0, None
        for step in path:
            if operator_name(step) == "aten::tanh":
                if softcap:
                    return None
                scale, softcap = 1.0, scale  # until the end: the factors outside and inside of tanh
            elif operator_name(step) == "aten::cat":
                sinks = self._sinks(step)
            elif (scaled := self.scaled(step)) is not None:
                scale *= scaled[1]
        return Logits(node, tuple(path), *((scale * softcap, scale) if softcap else (scale, 0.0)), sinks)

    def factors(self, product: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two token values that a product multiplies, in order."""
        args: Any = product.args[1] if operator_name(product) == "aten::einsum" else product.args[-2:]
        found = [n for n in args if self._taint.token(n)]
        return (found[0], found[1]) if len(found) == 2 else None

    def scaled(self, node: fx.Node) -> tuple[fx.Node, float] | None:
        """A token value and the number that it is multiplied with (or divided by), if the node is that."""
        name = operator_name(node)
        if name not in ("aten::mul", "aten::div") or node.kwargs:
            return None
        a, b = node.args[:2]
        if name == "aten::mul" and not (isinstance(a, fx.Node) and self._taint.token(a)):
            a, b = b, a
        number = self._number(b)
        if not isinstance(a, fx.Node) or not self._taint.token(a) or not number:
            return None
        return a, number if name == "aten::mul" else 1.0 / number

    def inner(self, node: fx.Node) -> fx.Node | None:
        """The one token value of which a step of the path is the next; None if the node cannot be such a step."""
        name = operator_name(node)
        args: Any = node.args
        tokens = list(dict.fromkeys(n for n in node.all_input_nodes if self._taint.token(n)))
        if _is_shift(node):
            return args[0]  # type: ignore[no-any-return]
        if len(tokens) != 1:
            return None
        x = tokens[0]
        if name == "aten::cat":
            known = len(args[0]) == 2 and args[0][0] is x
        elif name in ("aten::mul", "aten::div"):
            known = self.scaled(node) is not None
        elif name == "aten::add":
            known = args[0] is x or not node.kwargs
        elif name == "aten::where":
            known = args[0] is not x and self._hides(args[2] if args[1] is x else args[1])
        elif name == "aten::masked_fill":
            known = args[0] is x and self._hides(args[2])
        elif name in _FLOORS:
            known = args[0] is x and len(args) == 2 and self._hides(args[1])
        else:
            known = args[0] is x and name in MOVES | {"aten::tanh", "aten::sub"}
        return x if known else None

    def bias(self, logits: Logits, softmax: fx.Node, trace: Tracer, layouts: Layouts) -> fx.Node | None:
        """The logits of scores that are zero, as a new value that broadcasts to ``[B, H, T, T]``; None if nothing is added."""
        steps = [n for n in logits.path if operator_name(n) not in _FLOORS | {"aten::cat"} and not _is_shift(n)]
        added = [i for i, n in enumerate(steps) if operator_name(n) in _ADDITIVE]
        product = logits.scores
        beta: Any = product.kwargs.get("beta", 1.0) if operator_name(product) == "aten::baddbmm" else 0.0
        if not added and not beta:
            return None
        dtype = product.meta["val"].dtype
        inside = self.inner(steps[added[0]]) if not beta else product
        assert inside is not None
        small = not beta and layouts.is_scores(inside)
        if small and not any(operator_name(n) in MOVES - _CASTS for n in steps[added[0] : added[-1]]):
            # Where nothing is rearranged, a single zero does: the bias is no larger than what it is made of.
            value = trace.zeros([1] * 4, dtype)
            steps = [n for n in steps[added[0] :] if operator_name(n) not in MOVES]
        else:
            value, inside, small = trace.zeros(product.meta["val"].shape, dtype), product, False
            if beta and value is not None:
                value = trace(torch.ops.aten.add.Tensor, value, product.args[0], alpha=beta)
        if value is None:
            return None
        zero = {inside: value}
        for node in logits.path:
            before = self.inner(node)
            if node in steps:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: zero.get(n, n))
                value = zero[node] = trace(node.target, *args, **kwargs)
            elif before in zero:
                zero[node] = zero[before]
        keys: Any = softmax.args[1]
        return value if small else _by_heads(value, keys, trace)

    def _sinks(self, node: fx.Node) -> fx.Node:
        sinks: Any = node.args[0][1]  # type: ignore[index]
        while operator_name(sinks) in MOVES:
            sinks = sinks.args[0]
        assert isinstance(sinks, fx.Node)
        return sinks

    def _hides(self, value: object) -> bool:
        number = self._number(value)
        return number is not None and number <= _LOWEST

    def _number(self, value: object) -> float | None:
        """A number, or a constant that has one value throughout."""
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        if operator_name(value) in ("aten::full", "aten::full_like"):
            return self._number(value.args[1])
        known = value.meta["val"]
        if self._taint[value] or not isinstance(known, Tensor) or known.numel() != 1:
            return None
        return float(evaluate(self._captured, [value], torch.zeros(1, 1, dtype=torch.int64))[0])


def _by_heads(bias: fx.Node, keys: int, trace: Tracer) -> fx.Node | None:
    """``[B, H, T, T]`` of logits in any order of axes; ``keys`` is the axis of the keys."""
    shape = list(bias.meta["val"].shape)
    keys %= len(shape)
    varying = [d for d, n in enumerate(shape) if not isinstance(n, int) and d != keys]
    length = [d for d in varying if trace.is_length(shape[d])]
    rows = [d for d in varying if d not in length]
    if len(length) != 1 or len(rows) != 1:
        return None
    heads = [d for d, n in enumerate(shape) if isinstance(n, int)]
    moved = trace.permute(bias, [*rows, *heads, *length, keys])
    return trace.reshape(moved, [trace.batch, -1, trace.length, trace.length])


def _is_shift(node: fx.Node) -> bool:
    """Logits less the largest of their row: a softmax does not change."""
    value: Any = node.args[1] if operator_name(node) == "aten::sub" else None
    if isinstance(value, fx.Node) and value.target is operator.getitem:
        value = value.args[0]
    return isinstance(value, fx.Node) and operator_name(value) in ("aten::amax", "aten::max") and value.args[0] is node.args[0]
