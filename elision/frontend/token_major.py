"""Between the padded layout of a captured graph, ``[B, .., T, ..]``, and the IR's token-major one, ``[tokens, ..]``.

A captured value with one batch axis and one length axis is a value of the token axis; its other axes are the features,
in order. So a transpose that only moves heads past the length changes nothing in the IR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from elision.frontend.sites import attention_site
from elision.frontend.structure import is_attention
from elision.ir.tokens import Tokens


@dataclass(frozen=True)
class Layout:
    """Where the batch and length axes of a captured value are (the same place if they are one axis, ``[B * T, ..]``),
    and the sizes of the features."""

    batch: int
    length: int
    features: tuple[int, ...]

    @property
    def leading(self) -> bool:
        """Batch and length come first."""
        return self.batch == 0 and self.length in (0, 1)

    @property
    def flat(self) -> bool:
        """Only axes of size 1 come before batch and length or between them: features can be reshaped."""
        before = range(max(self.batch, self.length))
        return self.batch <= self.length and all(self.features[a] == 1 for d in before if (a := self.axis(d)) is not None)

    @property
    def merged(self) -> bool:
        """Batch and length are one axis, or there is one token per sequence."""
        return self.batch == self.length

    @property
    def rank(self) -> int:
        return len(self.features) + (1 if self.merged else 2)

    def axis(self, dim: int) -> int | None:
        """The index among the features of an axis (from the front or the back), None for batch and length."""
        dim = dim % self.rank
        others = [d for d in range(self.rank) if d not in (self.batch, self.length)]
        return others.index(dim) if dim in others else None

    def random(self, rows: int, length: int, seed: int) -> Tensor:
        """A float64 value of this layout, for checks."""
        shape: list[int] = list(self.features)
        sizes = [(self.batch, rows * length)] if self.merged else sorted([(self.batch, rows), (self.length, length)])
        for dim, size in sizes:
            shape.insert(dim, size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def tokens(self, x: Tensor) -> Tensor:
        """``[rows, length]`` wherever they are, to ``[rows * length, features]``."""
        if self.merged:
            return x.movedim(self.batch, 0)
        return x.movedim((self.batch, self.length), (0, 1)).flatten(0, 1)


class Layouts:
    """The layouts of a captured graph's values, by the symbols of its batch and length.

    Where the length is no symbol (the patches of an image), it is that of the queries of attention, and the first axis of that
    size after the batch; a wrong guess does not pass the checks.
    """

    def __init__(self, graph: fx.Graph, inputs: tuple[str, ...]) -> None:
        first = next(n for n in graph.nodes if n.op == "placeholder" and n.name in inputs)
        self._batch, self._length = (_symbol(n) for n in first.meta["val"].shape[:2])
        if isinstance(self._length, int):
            self._length = next((_symbol(attention_site(n).q.meta["val"].shape[2]) for n in graph.nodes if is_attention(n)), 0)

    def length(self, usual: int) -> int:
        """The length of the stream: ``usual``, unless there is only one."""
        return self._length if isinstance(self._length, int) else usual

    def of(self, node: fx.Node) -> Layout | None:
        """The layout of a value, or None if it has not exactly one batch and one length axis, one of both, or the batch alone
        (one token per sequence)."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        sizes: list[Any] = [n if isinstance(n, int) else _symbol(n) for n in value.shape]
        features = tuple(n for n in sizes if isinstance(n, int))
        varying = [n for n in sizes if not isinstance(n, int)]
        if varying in ([self._batch * self._length], [self._batch]):
            place = sizes.index(varying[0])
            if varying == [self._batch] and self._length in sizes[place + 1 :]:
                length = sizes.index(self._length, place + 1)
                return Layout(place, length, tuple(sizes[place + 1 : length] + sizes[length + 1 :]))
            return Layout(place, place, features)
        if len(varying) != 2 or {*varying} != {self._batch, self._length}:
            return None
        return Layout(sizes.index(self._batch), sizes.index(self._length), features)

    def is_scores(self, node: fx.Node | None) -> bool:
        """The value has the shape ``[B, H, T, T]``."""
        value = node.meta.get("val") if node is not None else None
        if not isinstance(value, Tensor) or value.dim() != 4 or not isinstance(value.shape[1], int):
            return False
        return [_symbol(value.shape[d]) for d in (0, 2, 3)] == [self._batch, self._length, self._length]


def _symbol(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def check_tokens(rows: int, length: int, first: int) -> tuple[Tensor, Tokens]:
    """Positions ``[rows, length]`` from ``first`` on, and the same tokens for the IR."""
    positions = torch.arange(first, first + length).expand(rows, length).contiguous()
    return positions, Tokens.chunk([length] * rows, [first] * rows)
