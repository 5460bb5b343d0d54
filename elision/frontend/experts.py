"""Mixture of experts in a captured graph: the experts between a router (`routers`) and the sum of their results.

The library's code sorts the tokens by expert, multiplies group by group and puts the results back: values that have no
token axis. What those compute is proposed as one `experts` op and decided by evaluation, like every anchor.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from elision.frontend.capture import Captured
from elision.frontend.evaluate import ancestors, evaluate
from elision.frontend.normalise import operator_name
from elision.frontend.pointwise import expression
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layouts
from elision.ir.expr import canonical
from elision.ir.ops import moe

_ROWS, _LENGTH = 2, 6


@dataclass(frozen=True)
class Experts:
    """``experts`` of ``x``, ``weight``, ``index`` gives ``end``. ``products``: the two weights as the graph has them,
    [experts, in, out]; ``biases``: theirs, [experts, out], or none."""

    x: fx.Node
    weight: fx.Node
    index: fx.Node
    end: fx.Node
    products: tuple[fx.Node, fx.Node]
    biases: tuple[fx.Node, ...]
    attrs: dict[str, Any]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.x, self.weight, self.index)

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        return (self.end,)


class ExpertFinder:
    """Finds the experts among the nodes of a block."""

    def __init__(self, captured: Captured, taint: Taint, layouts: Layouts, close: Callable[[Tensor, Tensor], bool]) -> None:
        self._captured, self._taint, self._layouts, self._close = captured, taint, layouts, close

    def experts(self, nodes: tuple[fx.Node, ...]) -> list[Experts]:
        """The expert regions of a block: connected values without a token axis, between values with one."""
        loose = [n for n in nodes if self._layouts.of(n) is None and n not in self._pairs(nodes)]
        products = [n for n in loose if _is_grouped(n)]
        found: list[Experts] = []
        for first, second in itertools.pairwise(products):
            if first not in ancestors([second]):
                continue
            region = _connected(second, set(loose))
            inputs = {i for n in region for i in n.all_input_nodes if self._taint.token(i) and i not in region}
            end = self._end(region, nodes)
            site = self._experts_of(first, second, inputs, end) if end is not None else None
            if site is not None:
                found.append(site)
        return found

    def _pairs(self, nodes: tuple[fx.Node, ...]) -> set[fx.Node]:
        """Nodes whose results are taken apart by getitem and have a token axis (top-k, split)."""
        users = {n: [u for u in n.users] for n in nodes}
        return {n for n in nodes if users[n] and all(self._layouts.of(u) is not None for u in users[n]) and not _is_tensor(n)}

    def _end(self, region: set[fx.Node], nodes: tuple[fx.Node, ...]) -> fx.Node | None:
        """The first value after the region with one vector per token."""
        out = [u for n in region for u in n.users if u not in region and u in nodes]
        while len(set(out)) == 1:
            layout = self._layouts.of(out[0])
            if layout is not None and len(layout.features) == 1:
                return out[0]
            out = list(out[0].users)
        return None

    def _experts_of(self, first: fx.Node, second: fx.Node, inputs: set[fx.Node], end: fx.Node) -> Experts | None:
        shapes = {n: self._layouts.of(n) for n in inputs}
        if any(s is None or not s.leading or len(s.features) != 1 for s in shapes.values()) or len(inputs) != 3:
            return None
        index = next((n for n in inputs if not n.meta["val"].is_floating_point()), None)
        floats = [n for n in inputs if n is not index]
        wide, up_bias = self._biased(first)
        _, down_bias = self._biased(second)
        attrs = activation(wide, second.args[0])
        if index is None or len(floats) != 2 or attrs is None or (up_bias is None) != (down_bias is None):
            return None
        biases = (up_bias, down_bias) if up_bias is not None and down_bias is not None else ()
        for x, weight in (floats, floats[::-1]):
            site = Experts(x, weight, index, end, (first.args[1], second.args[1]), biases, attrs)  # type: ignore[arg-type]
            if shapes[weight].features == shapes[index].features and self._agrees(site):  # type: ignore[union-attr]
                return site
        return None

    def _biased(self, product: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """A product with the bias of each row's expert added, and that bias; or the product alone."""
        users = list(product.users)
        if len(users) == 1 and operator_name(users[0]) == "aten::add":
            rows = next((n for n in users[0].all_input_nodes if n is not product), product)
            if operator_name(rows) == "aten::index" and self._taint.param_only(rows.all_input_nodes[0]):
                return users[0], rows.all_input_nodes[0]
        return product, None

    def _agrees(self, site: Experts) -> bool:
        """Whether the op gives what the graph gives, for random operands."""
        lx, lw, li, end = (self._layouts.of(n) for n in (site.x, site.weight, site.index, site.end))
        assert lx is not None and lw is not None and li is not None and end is not None
        x, gates, order = (layout.random(_ROWS, _LENGTH, seed=i) for i, layout in enumerate((lx, lw, li)))
        weights = [_random(tuple(n.meta["val"].shape), seed=3 + i) for i, n in enumerate((*site.products, *site.biases))]
        chosen = order.argsort(-1) + torch.arange(len(order))[(...,) + (None,) * (order.dim() - 1)]
        given = {site.x: x, site.weight: gates, site.index: chosen % weights[0].shape[0]}
        given.update(zip((*site.products, *site.biases), weights, strict=True))
        positions = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64)
        want = end.tokens(evaluate(self._captured, [site.end], positions, given=given, wide=True)[0])
        operands = [layout.tokens(given[n]) for layout, n in ((lx, site.x), (lw, site.weight), (li, site.index))]
        found = moe.experts(*operands, weights[0].mT, weights[1].mT, *weights[2:], **site.attrs)
        return self._close(found, want)


def activation(wide: fx.Node, result: Any) -> dict[str, Any] | None:
    """The expression that leads from the first product to the second, and how it cuts the channels into operands."""
    cuts: set[bool] = set()

    def text(node: fx.Node) -> str | None:
        if node is wide:
            return "x0"
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, fx.Node) and source.args[0] is wide:
            cuts.add(True)
            return f"x{node.args[1]}"
        if operator_name(node) == "aten::slice" and source is wide and node.args[4:] == (2,):
            cuts.add(False)
            return f"x{node.args[2]}"
        return expression(node, text)

    expr = text(result) if isinstance(result, fx.Node) else None
    if expr is None or len(cuts) > 1:
        return None
    return {"expr": canonical(expr), **({"halves": False} if False in cuts else {})}


def _connected(start: fx.Node, within: set[fx.Node]) -> set[fx.Node]:
    """The nodes that are joined to ``start`` by edges inside ``within``."""
    found, stack = {start}, [start]
    while stack:
        node = stack.pop()
        near = {n for n in (*node.all_input_nodes, *node.users) if n in within} - found
        found |= near
        stack += near
    return found


def _is_grouped(node: fx.Node) -> bool:
    return operator_name(node).rpartition("::")[2] in ("grouped_mm_fallback", "_grouped_mm", "grouped_mm")


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
