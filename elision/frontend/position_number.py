"""A number per token that depends on its position alone (the attention temperature of Llama 4), as an expression of the position.

The expression is read off the graph and accepted if it gives the graph's numbers in float64 at every position that the model
knows, up to a million. So it is right wherever a token stands, also in a step of decoding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from elision.errors import UnsupportedModel
from elision.frontend.anchors import close
from elision.frontend.capture import Captured
from elision.frontend.evaluate import evaluate
from elision.frontend.normalise import operator_name
from elision.frontend.pointwise import expression
from elision.frontend.structure import Segment
from elision.frontend.taint import Taint
from elision.ir import expr as scalar
from elision.ir.types import parse_dtype
from elision.ir.value import Builder, Value

# Positions at which an expression is compared, at most: one number each.
_MOST = 1 << 20
_MOVES = {"aten::reshape", "aten::expand", "aten::unsqueeze", "aten::select", "aten::to", "aten::_to_copy"}


class PositionNumbers:
    """The numbers of one captured graph; ``limit`` is the model's longest sequence."""

    def __init__(self, captured: Captured, taint: Taint, limit: int) -> None:
        self._captured, self._taint, self._limit = captured, taint, limit
        self._texts: dict[fx.Node, str | None] = {}

    def text(self, node: fx.Node) -> str | None:
        """The expression of the position ``x0`` (a float) that a value ``[.., T, ..]`` of one number per token is, or None."""
        if node not in self._texts:
            self._texts[node] = self._expression(node)
        return self._texts[node]

    def build(self, b: Builder, x: Value, node: fx.Node) -> Value | None:
        """The number of each token on the axis of ``x``, with the features (of size 1) that the graph's value has."""
        text = self.text(node)
        if text is None:
            return None
        value = node.meta["val"]
        dtype = parse_dtype(value.dtype)
        wide = "f64" if dtype == "f64" else "f32"
        place = _one(b.add("map", _one(b.add("positions", x, name="pos")), expr="x0", dtype=wide))
        number = _one(b.add("map", place, expr=text, **({"dtype": dtype} if dtype != wide else {})))
        return _one(b.add("view", number, shape=(1,) * (value.dim() - 2)))

    def counted(self, segment: Segment) -> bool:
        """The block reads a number that the model gets by counting the tokens of the call, from 0, not from its positions."""
        return any("position" not in self._taint[n] for n in segment.externals if self.text(n) is not None)

    def check(self, segments: Iterable[Segment]) -> None:
        """Raises UnsupportedModel if two blocks of one template read different numbers: an expression belongs to the template."""
        firsts: dict[int, Segment] = {}
        for segment in segments:
            first = firsts.setdefault(segment.template, segment)
            for a, b in zip(first.externals, segment.externals, strict=True):
                if self.text(a) != self.text(b):
                    raise UnsupportedModel(
                        f"layers {first.layer} and {segment.layer} are alike but for a number that depends on the position: "
                        f"{self.text(a)} and {self.text(b)}; expected the same"
                    )

    def _expression(self, node: fx.Node) -> str | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
            return None
        text = self._text(node) if self._taint.position_only(node) else None
        if text is None:
            return None
        found, longest = scalar.canonical(text), min(self._limit, _MOST)
        # The model's own forward has positions that count from 0, and so does a model that counts the tokens itself.
        starts = (0, 7, self._limit - longest) if "position" in self._taint[node] else (0,)
        return found if all(self._gives(node, found, longest, first) for first in starts) else None

    def _text(self, node: fx.Node) -> str | None:
        name = operator_name(node)
        if self._captured.kinds.get(node.name) == "position" or name == "aten::arange":
            return "x0"
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and (name in _MOVES or name == "aten::add" and node.args[1] == 0):
            return self._text(first)
        return expression(node, self._text)

    def _gives(self, node: fx.Node, text: str, length: int, first: int) -> bool:
        """Whether the graph has one number per token at positions ``first ..``, and the expression is that number."""
        positions = torch.arange(first, first + length)
        found = evaluate(self._captured, [node], positions[None], wide=True)[0]
        want = scalar.compiled(text)(positions.double())
        return found.numel() == length == max(found.shape) and close(found.flatten(), want)


def _one(value: Value | tuple[Value, ...]) -> Value:
    assert isinstance(value, Value)
    return value
