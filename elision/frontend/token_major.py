"""Between the padded layout of a captured graph, ``[B, .., T, ..]``, and the IR's token-major one, ``[tokens, ..]``.

A captured value with one batch axis and one length axis is a value of the token axis; its other axes are the features, in order. So
a transpose that only moves heads past the length changes nothing in the IR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from elision.ir.tokens import Tokens


@dataclass(frozen=True)
class Layout:
    """Where the batch and length axes of a captured value are, and the sizes of the features."""

    batch: int
    length: int
    features: tuple[int, ...]

    @property
    def leading(self) -> bool:
        """Batch and length come first: features can be reshaped."""
        return (self.batch, self.length) == (0, 1)

    def axis(self, dim: int) -> int | None:
        """The index among the features of an axis (from the front or the back), None for batch and length."""
        dim = dim % (len(self.features) + 2)
        others = [d for d in range(len(self.features) + 2) if d not in (self.batch, self.length)]
        return others.index(dim) if dim in others else None

    def random(self, rows: int, length: int, seed: int) -> Tensor:
        """A float64 value of this layout, for checks."""
        shape: list[int] = list(self.features)
        for dim, size in sorted([(self.batch, rows), (self.length, length)]):
            shape.insert(dim, size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def tokens(self, x: Tensor) -> Tensor:
        """``[rows, length]`` wherever they are, to ``[rows * length, features]``."""
        return x.movedim((self.batch, self.length), (0, 1)).flatten(0, 1)


class Layouts:
    """The layouts of a captured graph's values, by the symbols of its batch and length."""

    def __init__(self, graph: fx.Graph, inputs: tuple[str, ...]) -> None:
        first = next(n for n in graph.nodes if n.op == "placeholder" and n.name in inputs)
        self._batch, self._length = (_symbol(n) for n in first.meta["val"].shape[:2])

    def of(self, node: fx.Node) -> Layout | None:
        """The layout of a value, or None if it does not have exactly one batch and one length axis."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        sizes: list[Any] = [n if isinstance(n, int) else _symbol(n) for n in value.shape]
        if sizes.count(self._batch) != 1 or sizes.count(self._length) != 1:
            return None
        features = tuple(n for n in sizes if isinstance(n, int))
        if len(features) != len(sizes) - 2:
            return None
        return Layout(sizes.index(self._batch), sizes.index(self._length), features)


def _symbol(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def check_tokens(rows: int, length: int, first: int) -> tuple[Tensor, Tokens]:
    """Positions ``[rows, length]`` from ``first`` on, and the same tokens for the IR."""
    positions = torch.arange(first, first + length).expand(rows, length).contiguous()
    return positions, Tokens.chunk([length] * rows, [first] * rows)
