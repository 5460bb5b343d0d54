"""Operators without a rule: kept as they are, on padded operands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from elision.errors import UnsupportedModel
from elision.frontend.normalise import operator_name
from elision.frontend.rowwise import is_rowwise
from elision.ir.types import Tensor as TensorType
from elision.ir.types import parse_dtype
from elision.ir.value import Value

if TYPE_CHECKING:
    from elision.frontend.lower import Lowering


def keep(low: Lowering, node: fx.Node) -> Value:
    """The operator as it is, between `pad` and `unpad`. Raises UnsupportedModel where that
    cannot be said."""
    layout, value = low.layouts.of(node), node.meta.get("val")
    if (
        not operator_name(node).startswith("aten::")
        or layout is None
        or not layout.leading
        or layout.merged
        or node.kwargs
        or not isinstance(value, Tensor)
    ):
        raise UnsupportedModel(f"operator {node.target} has no rule and cannot be kept as it is: {node.format_node()}")
    operands: list[Value] = []

    def fill(item: Any) -> Any:
        if isinstance(item, fx.Node):
            given = low.value(item)
            found = low.layouts.of(item)
            if found is not None and (not found.leading or found.merged):
                raise UnsupportedModel(f"operator {node.target} reads a transposed value and has no rule")
            operands.append(low.add("pad", given) if given.tensor.tokens is not None else given)
            return ("arg", len(operands) - 1)
        if isinstance(item, list | tuple):
            return ("list", *map(fill, item))
        return ("dtype", parse_dtype(item)) if isinstance(item, torch.dtype) else item

    template = tuple(fill(a) for a in node.args)
    first = next(v for n in node.all_input_nodes if (v := low.value(n)).tensor.tokens is not None)
    padded = next(v for v in operands if v.op == "pad")
    rows, length = padded.tensor.axes[:2]
    results = TensorType((rows, length, *layout.features), parse_dtype(value.dtype))
    overload = str(node.target).removeprefix("aten.")
    attrs: dict[str, Any] = {"function": overload, "template": template, "results": results}
    if is_rowwise(overload, template, [v.tensor for v in operands]):
        attrs["rowwise"] = True
    return low.add("unpad", first, low.add("aten", *operands, **attrs))
