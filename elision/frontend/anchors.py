"""Sub-graphs that are one op: a norm around every ``rsqrt``, a rotation around every product with a position-only table.

A candidate region is read off the data flow; what it is, is decided by evaluating it against the op's own body in float64, with
float casts widened on both sides. Where nothing fits, the nodes are lowered one by one.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from elision.frontend.capture import Captured
from elision.frontend.classify import RopeTable, classify_rope, rope_tables
from elision.frontend.evaluate import ancestors, evaluate
from elision.frontend.normalise import operator_name
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layouts, check_tokens
from elision.ir.ops import dense

TOLERANCE = 1e-9  # largest relative difference of a raise to the sub-graph that it replaces, in float64


@dataclass(frozen=True)
class Anchor:
    """``end`` is the op ``op`` of ``start`` and of ``params`` (weights of the graph) with ``attrs``; ``inner`` are the
    nodes that it stands for. A rotation names its ``tables`` (cosine, sine; a complex one is both) instead of weights."""

    op: str
    start: fx.Node
    end: fx.Node
    inner: frozenset[fx.Node]
    params: tuple[fx.Node, ...]
    attrs: dict[str, Any]
    tables: tuple[fx.Node, ...] = ()

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.start,)

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        return (self.end,)


class AnchorFinder:
    """Finds the anchors of one captured graph; ``limit`` is the model's longest sequence."""

    def __init__(self, captured: Captured, taint: Taint, layouts: Layouts, limit: int) -> None:
        self._captured, self._taint, self._layouts, self._limit = captured, taint, layouts, limit
        self._tables: dict[tuple[fx.Node, fx.Node], RopeTable | None] = {}

    def find(self, nodes: tuple[fx.Node, ...], start: fx.Node | None) -> list[Anchor]:
        """The anchors among the nodes of a block, whose stream enters as ``start``."""
        inside = set(nodes) | ({start} if start is not None else set())
        found: list[Anchor] = []
        for node in nodes:
            if any(node in a.inner for a in found):
                continue
            if operator_name(node) == "aten::rsqrt":
                anchor = self._norm(node, inside)
            elif operator_name(node) == "aten::mul" and self._table_of(node) is not None:
                anchor = self._rotation(node, inside)
            else:
                continue
            if anchor is not None:
                found.append(anchor)
        return found

    def table(self, cos: fx.Node, sin: fx.Node) -> RopeTable | None:
        """The rotation that two position-only tables are, or None."""
        if (cos, sin) not in self._tables:
            self._tables[cos, sin] = classify_rope(self._captured, cos, sin, limit=self._limit)
        return self._tables[cos, sin]

    def fitted(self, cos: fx.Node, sin: fx.Node, positions: Tensor) -> dict[fx.Node, Tensor]:
        """The two tables in float64 where the model keeps rounded ones, to check what is done with them apart from that."""
        table = self.table(cos, sin)
        if table is None or table.exact:
            return {}
        value = evaluate(self._captured, [cos], positions)[0]
        if value.is_complex():
            return {}
        shape = value.shape
        rows = [t[:, None] if len(shape) == 4 and shape[-2] == 1 else t for t in rope_tables(table, positions[0])]
        return {node: t.expand(shape) for node, t in zip((cos, sin), rows, strict=True)}

    # --- norms ---

    def _norm(self, rsqrt: fx.Node, inside: set[fx.Node]) -> Anchor | None:
        # The op has the dtype of its operand, so a cast to float32 on the way in belongs to it.
        for start in sorted(self._above(rsqrt, inside, lambda n: True), key=_is_cast):
            layout, dtype = self._layouts.of(start), start.meta["val"].dtype
            if layout is None or not layout.features or layout.features[-1] == 1:
                continue
            region = self._region(start, inside, partial(self._vector, layout.features[-1]))
            ends = [n for n in region if self._layouts.of(n) == layout and n.meta["val"].dtype == dtype]
            for end in reversed([n for n in ends if rsqrt in ancestors([n], {start: None})]):
                used = [n for n in region if n in ancestors([end], {start: None})]
                weights = self._sources(used)
                attrs = self._norm_attrs(start, end, used, weights) if len(weights) <= 2 else None
                if attrs is not None:
                    return Anchor("norm", start, end, frozenset(used), tuple(weights), attrs)
        return None

    def _sources(self, used: list[fx.Node]) -> list[fx.Node]:
        """The weights that the nodes read, also through an expression such as ``1 + w``."""
        read = [w for n in used for w in n.all_input_nodes if self._taint.param_only(w)]
        found = [p for w in read for p in sorted(ancestors([w])) if p.op == "placeholder" and "param" in self._taint[p]]
        return list(dict.fromkeys(found))

    def _norm_attrs(self, start: fx.Node, end: fx.Node, used: list[fx.Node], weights: list[fx.Node]) -> dict[str, Any] | None:
        layout = self._layouts.of(start)
        assert layout is not None
        width = layout.features[-1]
        x = layout.random(2, 3, seed=0)
        values = [
            torch.randn(width, generator=torch.Generator().manual_seed(i + 1), dtype=torch.float64) for i in range(len(weights))
        ]
        given = {start: x, **dict(zip(weights, values, strict=True))}
        want = evaluate(self._captured, [end], torch.zeros(2, 3, dtype=torch.int64), given=given, wide=True)[0]
        epsilons = [a for n in used if operator_name(n) == "aten::add" for a in n.args if isinstance(a, float)] or [0.0]
        for kind, eps, offset in itertools.product(("rms", "layer", "l2"), dict.fromkeys(epsilons), (0.0, 1.0)):
            attrs: dict[str, Any] = {"kind": kind, "eps": eps}
            if offset and weights:
                attrs["offset"] = offset
            if close(dense.norm(x, *values, **attrs), want):
                return {**attrs, "cast": self._cast(start, end, given, attrs)}
        return None

    def _cast(self, start: fx.Node, end: fx.Node, given: dict[fx.Node, Tensor], attrs: dict[str, Any]) -> str:
        """Where a half-precision model leaves float32, seen by evaluating it in its own dtype; wide models have no such place."""
        dtype = start.meta["val"].dtype
        if dtype not in (torch.bfloat16, torch.float16):
            return "late"
        narrow = {n: v.to(n.meta["val"].dtype) for n, v in given.items()}
        want = evaluate(self._captured, [end], torch.zeros(2, 3, dtype=torch.int64), given=narrow)[0]
        x, *weights = narrow.values()
        error = {c: float((dense.norm(x, *weights, **attrs, cast=c) - want).abs().double().sum()) for c in ("late", "early")}
        return min(error, key=lambda c: error[c])

    def _vector(self, width: int, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return self._taint.param_only(node) and isinstance(value, Tensor) and tuple(value.shape) == (width,)

    # --- rotations ---

    def _table_of(self, node: fx.Node) -> fx.Node | None:
        """The position-only table that a product reads, if it is one of a token value with such a table."""
        tables = [n for n in node.all_input_nodes if self._is_table(n)]
        return tables[0] if len(tables) == 1 and self._taint.token(node) else None

    def _is_table(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        varies = "position" in self._taint[node] and self._taint.position_only(node)
        return varies and isinstance(value, Tensor) and value.dim() >= 3 and (value.is_floating_point() or value.is_complex())

    def _rotation(self, product: fx.Node, inside: set[fx.Node]) -> Anchor | None:
        for start in reversed(list(self._above(product, inside, _moves))):
            layout = self._layouts.of(start)
            if layout is None or not layout.features:
                continue
            region = self._region(start, inside, self._is_table)
            dtype = start.meta["val"].dtype  # a cast that follows belongs to what reads it
            ends = [n for n in region if self._layouts.of(n) == layout and n.meta["val"].dtype == dtype]
            for end in reversed([n for n in ends if product in ancestors([n], {start: None})]):
                used = [n for n in region if n in ancestors([end], {start: None})]
                tables = list(dict.fromkeys(t for n in used for t in n.all_input_nodes if self._is_table(t)))
                anchor = self._rotation_of(start, end, used, tables)
                if anchor is not None:
                    return anchor
        return None

    def _rotation_of(self, start: fx.Node, end: fx.Node, used: list[fx.Node], tables: list[fx.Node]) -> Anchor | None:
        if len(tables) == 1 and tables[0].meta["val"].is_complex():
            tables = tables * 2
        if len(tables) != 2:
            return None
        for cos, sin in (tables, tables[::-1]):
            table = self.table(cos, sin)
            if table is None:
                continue
            layout = self._layouts.of(start)
            assert layout is not None
            x = layout.random(2, 5, seed=0)
            positions, at = check_tokens(2, 5, first=3)
            given = {start: x, **self.fitted(cos, sin, positions)}
            want = layout.tokens(evaluate(self._captured, [end], positions, given=given, wide=True)[0])
            for style in ("half", "interleaved", "parted"):
                attrs: dict[str, Any] = {"style": style, "scale": float(table.scale)}
                if 2 * len(table.inv_freq) > layout.features[-1]:
                    continue
                if close(dense.rope(layout.tokens(x), table.inv_freq.double(), at=at, **attrs), want):
                    return Anchor("rope", start, end, frozenset(used), (), attrs, (cos, sin))
        return None

    # --- regions ---

    def _above(self, node: fx.Node, inside: set[fx.Node], through: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
        """The values that the node is computed from while there is only one at a time, nearest first."""
        while node in inside:
            tokens = [n for n in node.all_input_nodes if self._taint.token(n)]
            if len(set(tokens)) != 1 or not through(node):
                return
            node = tokens[0]
            if node in inside:
                yield node

    def _region(self, start: fx.Node, inside: set[fx.Node], other: Callable[[fx.Node], bool]) -> list[fx.Node]:
        """Nodes computed from ``start`` and, besides, only from what ``other`` allows, in order."""
        reached = {start}
        found: list[fx.Node] = []
        for node in sorted(inside):
            if node is start or node < start or not (operator_name(node) in _REGION or node.target is operator.getitem):
                continue
            inputs = node.all_input_nodes
            if any(n in reached for n in inputs) and all(n in reached or other(n) or self._is_size(n) for n in inputs):
                reached.add(node)
                found.append(node)
        return found

    def _is_size(self, node: fx.Node) -> bool:
        return self._taint[node] <= {"shape"} and not isinstance(node.meta.get("val"), Tensor)


_SHUFFLES = {
    "aten::slice", "aten::neg", "aten::cat", "aten::stack", "aten::chunk", "aten::split", "aten::split_with_sizes",
    "aten::unbind", "aten::flatten", "aten::reshape", "aten::to", "aten::unsqueeze", "aten::select", "aten::view_as_complex",
    "aten::view_as_real",
}  # fmt: skip
_REGION = _SHUFFLES | {
    "aten::mul", "aten::add", "aten::sub", "aten::pow", "aten::mean", "aten::sum", "aten::rsqrt", "aten::_to_copy",
    "aten::type_as", "aten::square", "aten::var",
}  # fmt: skip


def _moves(node: fx.Node) -> bool:
    """A product, or an operator that only moves channels."""
    return operator_name(node) in _SHUFFLES | {"aten::mul"} or node.target is operator.getitem


def _is_cast(node: fx.Node) -> bool:
    return operator_name(node) in ("aten::to", "aten::_to_copy")


def close(found: Tensor, want: Tensor) -> bool:
    """Equal up to `TOLERANCE`, relative to the largest value."""
    if found.shape != want.shape:
        return False
    return float((found - want).abs().max()) <= TOLERANCE * max(1e-30, float(want.abs().max()))
