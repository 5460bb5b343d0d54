"""New nodes in a captured graph, each with the value that it has for symbolic sizes (``meta["val"]``)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


class Tracer:
    """Adds calls to ``graph``, where it inserts at the moment. ``batch`` and ``length`` are the sizes of its first input."""

    def __init__(self, graph: fx.Graph, inputs: Sequence[str]) -> None:
        self._graph = graph
        ids = next(n for n in graph.nodes if n.op == "placeholder" and n.name in inputs)
        self._mode = ids.meta["val"].fake_mode
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            self.batch, self.length = (self(aten.sym_size.int, ids, d) for d in (0, 1))

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self._graph.call_function(target, args, kwargs)
        with self._mode:
            node.meta["val"] = target(*fx.node.map_arg(args, _value), **fx.node.map_arg(kwargs, _value))
        return node

    def size(self, n: Any) -> Any:
        """A size as an argument: the number, or the node of a multiple of the batch, the length or both. None for others."""
        if isinstance(n, int):
            return n
        batch, length = _value(self.batch).node.expr, _value(self.length).node.expr
        for expr, nodes in ((batch, (self.batch,)), (length, (self.length,)), (batch * length, (self.batch, self.length))):
            count = n.node.expr / expr
            if count.is_Integer:
                factors = [*nodes, int(count)] if count != 1 else list(nodes)
                found = factors[0]
                for factor in factors[1:]:
                    found = self(operator.mul, found, factor)
                return found
        return None

    def is_length(self, n: Any) -> bool:
        """A size is the length."""
        return not isinstance(n, int) and n.node.expr == _value(self.length).node.expr

    def zeros(self, shape: Sequence[Any], dtype: torch.dtype) -> fx.Node | None:
        """Zeros of a shape of meta values."""
        sizes = [self.size(n) for n in shape]
        return None if None in sizes else self(aten.zeros.default, sizes, dtype=dtype)

    def reshape(self, node: fx.Node, shape: Sequence[Any]) -> fx.Node:
        return self(aten.reshape.default, node, list(shape))

    def permute(self, node: fx.Node, order: Sequence[int]) -> fx.Node:
        return node if list(order) == sorted(order) else self(aten.permute.default, node, list(order))

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if _value(node).dtype == dtype else self(aten.to.dtype, node, dtype)


def _value(node: fx.Node) -> Any:
    return node.meta["val"]
