"""Mixture of experts in a captured graph: the router around a top-k, and the experts between it and the sum of their results.

The library's code sorts the tokens by expert, multiplies group by group and puts the results back: values that have no
token axis. What those compute is proposed as one `experts` op and decided by evaluation, like every anchor.
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
from elision.frontend.normalise import operator_name
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layouts
from elision.ir.ops import moe

_ACTIVATIONS = (
    "silu(x0) * x1",
    "gelu(x0) * x1",
    "gelu_tanh(x0) * x1",
    "relu(x0) * x1",
    "silu(x1) * x0",
    "silu(x0)",
    "gelu(x0)",
    "relu(x0)",
)
_ROWS, _LENGTH = 2, 6


@dataclass(frozen=True)
class Router:
    """``route`` of ``logits`` gives ``weight`` and ``index`` with ``attrs``."""

    logits: fx.Node
    weight: fx.Node
    index: fx.Node
    attrs: dict[str, Any]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.logits,)

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        return (self.weight, self.index)


@dataclass(frozen=True)
class Experts:
    """``experts`` of ``x``, ``weight``, ``index`` gives ``end``; ``up`` and ``down`` are the weights as the graph has
    them, [experts, in, out]."""

    x: fx.Node
    weight: fx.Node
    index: fx.Node
    end: fx.Node
    up: fx.Node
    down: fx.Node
    attrs: dict[str, Any]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.x, self.weight, self.index)

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        return (self.end,)


class ExpertFinder:
    """Finds routers and experts among the nodes of a block."""

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

    def routers(self, nodes: tuple[fx.Node, ...], sites: list[Experts]) -> list[Router]:
        """The routers that give the weights and indices of these experts."""
        found = [self._router_of(s, set(nodes)) for s in sites]
        return [r for r in found if r is not None]

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
        if index is None or len(floats) != 2:
            return None
        k = shapes[index].features[0]  # type: ignore[union-attr]
        up, down = first.args[1], second.args[1]
        assert isinstance(up, fx.Node) and isinstance(down, fx.Node)
        for x, weight in (floats, floats[::-1]):
            if shapes[weight].features != (k,):  # type: ignore[union-attr]
                continue
            attrs = self._attrs(x, weight, index, end, up, down)
            if attrs is not None:
                return Experts(x, weight, index, end, up, down, attrs)
        return None

    def _attrs(
        self, x: fx.Node, weight: fx.Node, index: fx.Node, end: fx.Node, up: fx.Node, down: fx.Node
    ) -> dict[str, Any] | None:
        layouts = [self._layouts.of(n) for n in (x, weight, index)]
        lx, lw, li = layouts
        assert lx is not None and lw is not None and li is not None
        count, width, wide = up.meta["val"].shape
        _, inner, out = down.meta["val"].shape
        values = lx.random(_ROWS, _LENGTH, seed=0)
        gates = lw.random(_ROWS, _LENGTH, seed=1)
        chosen = (
            li.random(_ROWS, _LENGTH, seed=2).argsort(-1) if li.features[0] > 1 else torch.zeros_like(gates, dtype=torch.int64)
        )
        chosen = (chosen + torch.arange(chosen.numel() // li.features[0]).reshape(*chosen.shape[:-1], 1)) % count
        weights = [_random((count, width, wide), 3), _random((count, inner, out), 4)]
        given = {x: values, weight: gates, index: chosen, up: weights[0], down: weights[1]}
        positions = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64)
        want = evaluate(self._captured, [end], positions, given=given, wide=True)[0]
        end_layout = self._layouts.of(end)
        assert end_layout is not None
        want = end_layout.tokens(want)
        operands = (lx.tokens(values), lw.tokens(gates), li.tokens(chosen), weights[0].mT, weights[1].mT)
        for expr, halves in itertools.product(_ACTIVATIONS, (True, False)):
            if wide != inner * (2 if "x1" in expr else 1):
                continue
            attrs = {"expr": expr} if halves else {"expr": expr, "halves": False}
            if self._close(moe.experts(*operands, **attrs), want):  # type: ignore[arg-type]
                return attrs
        return None

    def _router_of(self, site: Experts, inside: set[fx.Node]) -> Router | None:
        """Walk up from weights and indices to the logits that both come from, and find what routing gives them."""
        k = site.index.meta["val"].shape[-1]
        positions = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64)
        for logits in self._common(site, inside):
            layout = self._layouts.of(logits)
            if layout is None or not layout.leading or len(layout.features) != 1 or layout.features[0] <= k:
                continue
            x = layout.random(_ROWS, _LENGTH, seed=5)
            weight, index = evaluate(self._captured, [site.weight, site.index], positions, given={logits: x}, wide=True)
            flat = [self._layouts.of(n).tokens(v) for n, v in ((site.weight, weight), (site.index, index))]  # type: ignore[union-attr]
            for kind, renormalise in itertools.product(("softmax", "sigmoid"), (True, False)):
                found = moe.route(layout.tokens(x), k=k, kind=kind, renormalise=renormalise)
                if torch.equal(found[1], flat[1]) and self._close(found[0], flat[0]):
                    return Router(logits, site.weight, site.index, {"k": k, "kind": kind, "renormalise": renormalise})
        return None

    def _common(self, site: Experts, inside: set[fx.Node]) -> Iterator[fx.Node]:
        """Token values that both the weights and the indices are computed from, nearest first."""
        both = ancestors([site.weight]) & ancestors([site.index]) & inside
        yield from sorted((n for n in both if _is_tensor(n)), reverse=True)


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
