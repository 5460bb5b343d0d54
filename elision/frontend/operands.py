"""What a template reads besides the stream, and which weight of each block that is.

A template is built from one block; its operands are described by their slots in that block, so that they can be found
again in every other block of the template (see `elision.frontend.structure.Segment`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from elision.errors import UnsupportedModel
from elision.frontend.anchors import AnchorFinder
from elision.frontend.bias import Biases
from elision.frontend.capture import Captured
from elision.frontend.evaluate import ancestors, evaluate
from elision.frontend.structure import Segment
from elision.ir.types import Tensor as TensorType
from elision.ir.types import parse_dtype

_NOWHERE = torch.zeros(1, 1, dtype=torch.int64)


@dataclass(frozen=True)
class Weight:
    """The weight in slot ``slot``, or an ``expression`` of it alone, transposed or not."""

    slot: int
    expression: fx.Node | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Buffer:
    """The constant of the model, or expression of one, in slot ``slot`` of the externals."""

    slot: int


@dataclass(frozen=True)
class Frequencies:
    """The rotation frequencies of the tables in slots ``cos`` and ``sin`` of the externals."""

    cos: int
    sin: int
    scale: float


@dataclass(frozen=True)
class Slopes:
    """The ALiBi slopes of the attention bias in slot ``slot`` of the externals, for so many heads."""

    slot: int
    heads: int


Operand = Weight | Buffer | Frequencies | Slopes


class Operands:
    """Finds, names and stores the weights of operands."""

    def __init__(
        self,
        captured: Captured,
        finder: AnchorFinder,
        biases: Biases,
        weights: dict[str, Tensor],
        params: dict[str, TensorType],
    ) -> None:
        self._captured, self._finder, self._biases, self._weights, self._params = captured, finder, biases, weights, params

    def describe(self, node: fx.Node, segment: Segment, transposed: bool = False) -> Weight | Buffer:
        """The operand that a node of the block is. Raises UnsupportedModel if it is not one weight or an expression of one."""
        if node in segment.externals and not transposed:
            return Buffer(segment.externals.index(node))
        return Weight(segment.params.index(self.source(node)), None if node.op == "placeholder" else node, transposed)

    def source(self, node: fx.Node) -> fx.Node:
        """The one weight that an expression of weights reads."""
        found = [n for n in ancestors([node]) if n.op == "placeholder"]
        if len(found) != 1 or found[0].name not in self._captured.source:
            raise UnsupportedModel(f"{node.format_node()} is neither a weight nor an expression of one")
        return found[0]

    def name(self, operand: Operand, segment: Segment) -> str:
        """The parameter that the operand is in a block."""
        if isinstance(operand, Weight):
            return self.weight(segment.params[operand.slot], operand.expression, operand.transposed)
        if isinstance(operand, Buffer):
            node = segment.externals[operand.slot]
            return self.weight(self.source(node), None if node.op == "placeholder" else node)
        if isinstance(operand, Slopes):
            slopes = self._biases.of(segment.externals[operand.slot]).slopes
            if slopes is None:
                raise UnsupportedModel(f"the attention of layer {segment.layer} has no ALiBi, as another of its template has")
            return self.shared("alibi.slopes", slopes.expand(operand.heads))
        table = self._finder.table(segment.externals[operand.cos], segment.externals[operand.sin])
        if table is None or float(table.scale) != operand.scale:
            raise UnsupportedModel(f"the rotation of layer {segment.layer} is not of the same kind as that of its template")
        return self.shared("rope.inv_freq", table.inv_freq)

    def exact(self, operand: Operand, segment: Segment) -> Tensor:
        """The operand's value for checks: an expression of a weight (``1 + w``) is not rounded to the weight's dtype."""
        if isinstance(operand, Slopes):
            exact = self._biases.of(segment.externals[operand.slot]).exact
            assert exact is not None
            return exact.expand(operand.heads)
        if not isinstance(operand, Weight) or operand.expression is None:
            return self._weights[self.name(operand, segment)]
        found: Tensor = evaluate(self._captured, [operand.expression], _NOWHERE, wide=True)[0]
        return found.mT if operand.transposed else found

    def weight(self, placeholder: fx.Node, expression: fx.Node | None = None, transposed: bool = False) -> str:
        """The parameter of a weight or of an expression of it (stored as a view where it is one)."""
        name = self._captured.source[placeholder.name]
        tensor = self._captured.params[name]
        if expression is not None:
            given = {self.source(expression): tensor}
            tensor = evaluate(self._captured, [expression], _NOWHERE, given=given)[0]
            name = f"{name}.{expression.name.rstrip('0123456789_')}"
        if transposed:
            tensor, name = tensor.mT, f"{name}.t"
        base = self._captured.params[self._captured.source[placeholder.name]]
        if tensor.shape == base.shape and tensor.stride() == base.stride() and tensor.data_ptr() == base.data_ptr():
            tensor, name = base, self._captured.source[placeholder.name]  # a transpose of a transpose
        self.store(name, tensor)
        return name

    def shared(self, prefix: str, values: Tensor) -> str:
        """The parameter that holds these values, which are data of no single layer; made if there is none."""
        values = values.detach().clone().contiguous()
        there = [n for n in self._weights if n.startswith(prefix)]
        for name in there:
            if self._weights[name].dtype == values.dtype and torch.equal(self._weights[name], values):
                return name
        name = f"{prefix}{len(there) or ''}"
        self.store(name, values)
        return name

    def store(self, name: str, tensor: Tensor) -> None:
        self._weights[name] = tensor
        self._params[name] = TensorType(tuple(tensor.shape), parse_dtype(tensor.dtype))

    def type(self, name: str) -> TensorType:
        return self._params[name]
