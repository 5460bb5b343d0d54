"""Mixture of experts spelled densely: every expert is computed for every token, by batched products ``[experts, tokens, width]``,
and a score per expert that is zero for those not chosen weights its input or its output.

What the scores are of the logits, and the sum of the logits and the input, is proposed and decided by evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from elision.frontend.capture import Captured
from elision.frontend.evaluate import ancestors, evaluate
from elision.frontend.experts import activation
from elision.frontend.normalise import operator_name
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layout, Layouts
from elision.ir.ops import moe

_ROWS, _LENGTH = 2, 6
_POSITIONS = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64)


@dataclass(frozen=True)
class DenseExperts:
    """``experts`` of ``x``, with the ``route`` of ``logits``, gives ``end``. ``products``: the two weights as the graph has them,
    [experts, in, out]; ``routing`` and ``attrs``: the attributes of the two ops."""

    x: fx.Node
    logits: fx.Node
    end: fx.Node
    products: tuple[fx.Node, fx.Node]
    routing: dict[str, Any]
    attrs: dict[str, Any]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.x, self.logits)

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        return (self.end,)


class DenseExpertFinder:
    """Finds such mixtures among the nodes of a block."""

    def __init__(self, captured: Captured, taint: Taint, layouts: Layouts, close: Callable[[Tensor, Tensor], bool]) -> None:
        self._captured, self._taint, self._layouts, self._close = captured, taint, layouts, close

    def find(self, nodes: tuple[fx.Node, ...]) -> list[DenseExperts]:
        """The mixtures of a block: two batched products with weights, one after the other, up to one vector per token."""
        products = [n for n in nodes if operator_name(n) == "aten::bmm" and self._taint.param_only(n.all_input_nodes[-1])]
        found = (self._mixture(a, b, nodes) for a, b in itertools.pairwise(products) if a in ancestors([b]))
        return [f for f in found if f is not None]

    def _mixture(self, first: fx.Node, second: fx.Node, nodes: tuple[fx.Node, ...]) -> DenseExperts | None:
        end = self._end(second)
        attrs = activation(first, second.args[0])
        if end is None or attrs is None:
            return None
        weights = (first.all_input_nodes[-1], second.all_input_nodes[-1])
        inputs = self._inputs(end, set(nodes))
        for x, scores in itertools.permutations(inputs) if len(inputs) == 2 else ():
            if self._vector(scores) != weights[0].meta["val"].shape[0]:
                continue
            for logits, routing in self._routings(scores, set(nodes)):
                for weighted in ({}, {"weighted": "input"}):
                    site = DenseExperts(x, logits, end, weights, routing, {**attrs, **weighted})
                    if self._agrees(site, scores):
                        return site
        return None

    def _vector(self, node: fx.Node) -> int | None:
        """The width of a value that is one vector per token, else None."""
        layout = self._layouts.of(node)
        return layout.features[0] if layout is not None and layout.leading and len(layout.features) == 1 else None

    def _end(self, node: fx.Node) -> fx.Node | None:
        """The first value after a product with one vector per token."""
        while len(node.users) == 1:
            node = next(iter(node.users))
            if self._vector(node) is not None:
                return node
        return None

    def _inputs(self, end: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
        """The values with one vector per token that ``end`` is computed from."""
        found: dict[fx.Node, None] = {}
        stack, seen = list(end.all_input_nodes), {end}
        while stack:
            node = stack.pop()
            if node in seen or not self._taint.token(node):
                continue
            seen.add(node)
            if self._vector(node) is not None or node not in inside:
                found[node] = None
            else:
                stack += node.all_input_nodes
        return list(found)

    def _routings(self, scores: fx.Node, inside: set[fx.Node]) -> Iterator[tuple[fx.Node, dict[str, Any]]]:
        """Values that the scores are the routing of, spread over the experts, and its attributes. The farthest comes first, so
        that the choice is part of it."""
        for logits in sorted(ancestors([scores]) & inside):
            if logits is scores or self._vector(logits) != self._vector(scores):
                continue
            source, target = self._layout(logits), self._layout(scores)
            x = source.random(_ROWS, _LENGTH, seed=5)
            want = target.tokens(evaluate(self._captured, [scores], _POSITIONS, given={logits: x}, wide=True)[0])
            chosen = (want != 0).sum(-1).unique()
            if len(chosen) != 1 or not int(chosen):
                continue
            for kind, renormalise in itertools.product(("softmax", "sigmoid"), (False, True)):
                routing = {"k": int(chosen), "kind": kind, "renormalise": renormalise}
                if self._close(_spread(source.tokens(x), **routing), want):
                    yield logits, routing

    def _agrees(self, site: DenseExperts, scores: fx.Node) -> bool:
        """Whether the ops give what the graph gives, for random operands."""
        lx, ll, ls, end = (self._layout(n) for n in (site.x, site.logits, scores, site.end))
        x, logits = lx.random(_ROWS, _LENGTH, seed=0), ll.random(_ROWS, _LENGTH, seed=1)
        generator = torch.Generator().manual_seed(2)
        up, down = (torch.randn(n.meta["val"].shape, generator=generator, dtype=torch.float64) for n in site.products)
        given = {site.x: x, site.logits: logits, **dict(zip(site.products, (up, down), strict=True))}
        want = end.tokens(evaluate(self._captured, [site.end], _POSITIONS, given=given, wide=True)[0])
        weight, index = moe.route(ll.tokens(logits), **site.routing)
        return self._close(moe.experts(lx.tokens(x), weight, index, up.mT, down.mT, **site.attrs), want)

    def _layout(self, node: fx.Node) -> Layout:
        layout = self._layouts.of(node)
        assert layout is not None
        return layout


def _spread(logits: Tensor, **routing: Any) -> Tensor:
    """The gate weights in a row of zeros with a place for every expert."""
    weight, index = moe.route(logits, **routing)
    return torch.zeros_like(logits).scatter(-1, index, weight)
