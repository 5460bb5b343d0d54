"""What each value of a captured graph depends on: parameters, token values, positions, which tokens are valid, shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import fx

from elision.frontend.normalise import operator_name

Source = Literal["param", "token", "position", "valid", "shape"]

# Operators that read the shape of their first argument and none of its values.
_SHAPE_READERS = {
    "aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::empty_like", "aten::zeros_like",
    "aten::ones_like", "aten::full_like", "aten::new_empty", "aten::new_zeros", "aten::new_ones",
}  # fmt: skip


class Taint:
    """Sources of every node of ``graph``. ``kinds`` maps placeholder names to kinds (``Captured.kinds``).

    Buffers and constants are data of the model that do not vary and carry no source of their own.
    """

    def __init__(self, graph: fx.Graph, kinds: Mapping[str, str]) -> None:
        self.sources: dict[fx.Node, frozenset[Source]] = {}
        for node in graph.nodes:
            self.sources[node] = self._of(node, kinds)

    def _of(self, node: fx.Node, kinds: Mapping[str, str]) -> frozenset[Source]:
        if node.op == "placeholder":
            kind = kinds.get(node.name, "const")
            return frozenset() if kind == "const" else frozenset((kind,))  # type: ignore[arg-type]
        found: set[Source] = set()
        shape_of = node.args[0] if operator_name(node) in _SHAPE_READERS else None
        for used in node.all_input_nodes:
            # full_like and the new_* family may also read a value (the fill): only the first is bare.
            if used is shape_of:
                found |= {"shape"} if _varies(used) else set()
            else:
                found |= self.sources[used]
        return frozenset(found)

    def __getitem__(self, node: fx.Node) -> frozenset[Source]:
        return self.sources[node]

    def token(self, node: fx.Node) -> bool:
        """The value depends on token values (it is part of the data flow of the model)."""
        return "token" in self.sources[node]

    def position_only(self, node: fx.Node) -> bool:
        """The value depends on positions and shapes only: a mask, a rotation table, a size."""
        return self.sources[node] <= {"position", "shape"}

    def param_only(self, node: fx.Node) -> bool:
        """The value depends on parameters and constants only: a weight, or an expression of weights."""
        return self.sources[node] <= {"param"}


def _varies(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(not isinstance(n, int) for n in value.shape)
