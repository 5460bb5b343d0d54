"""Routers in a captured graph: the region between the logits of a router and the weights and indices that experts read.

What it may be is read off its operators (the groups of a reshape, the k of a top-k, the factors); what it is, is decided by
evaluating it against `route`, like every anchor.
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

_ROWS, _LENGTH = 2, 12
# Shifts of the logits and of the bias: a number added to a sum of sigmoids (1e-20) shows where these are small, and zeros in
# place of what is not to be chosen where scores are negative.
_SHIFTS = ((0.0, 0.0), (-46.0, 0.0), (0.0, -5.0))


@dataclass(frozen=True)
class Router:
    """``route`` of ``logits`` and of ``bias`` (one or none) gives ``weight`` and ``index`` with ``attrs``."""

    logits: fx.Node
    bias: tuple[fx.Node, ...]
    weight: fx.Node
    index: fx.Node
    attrs: dict[str, Any]

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        return (self.logits,)

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        return (self.weight, self.index)


class RouterFinder:
    """Finds the routers of weights and indices."""

    def __init__(self, captured: Captured, taint: Taint, layouts: Layouts, close: Callable[[Tensor, Tensor], bool]) -> None:
        self._captured, self._taint, self._layouts, self._close = captured, taint, layouts, close

    def find(self, weight: fx.Node, index: fx.Node, inside: set[fx.Node]) -> Router | None:
        """Walk up to the logits that both come from, nearest first, and find what routing gives them."""
        k = index.meta["val"].shape[-1]
        both = ancestors([weight]) & ancestors([index]) & inside
        floats = (n for n in both if isinstance(v := n.meta.get("val"), Tensor) and v.is_floating_point())
        for logits in sorted(floats, reverse=True):
            layout = self._layouts.of(logits)
            if layout is None or not layout.leading or len(layout.features) != 1 or layout.features[0] <= k:
                continue
            region = sorted(ancestors([weight, index], {logits: None}) & inside - {logits})
            bias = self._biases(region, layout.features[0])
            if len(bias) <= 1:
                found = self._router_of(Router(logits, bias, weight, index, {"k": k}), region)
                if found is not None:
                    return found
        return None

    def _biases(self, region: list[fx.Node], experts: int) -> tuple[fx.Node, ...]:
        """The weights and buffers with one number per expert that the region reads."""
        read = dict.fromkeys(n for node in region for n in node.all_input_nodes if self._taint.param_only(n))
        return tuple(n for n in read if isinstance(v := n.meta.get("val"), Tensor) and tuple(v.shape) == (experts,))

    def _router_of(self, site: Router, region: list[fx.Node]) -> Router | None:
        layout = self._layouts.of(site.logits)
        assert layout is not None
        logits = layout.random(_ROWS, _LENGTH, seed=5)
        bias = [torch.randn(layout.features, generator=torch.Generator().manual_seed(7), dtype=torch.float64) for _ in site.bias]
        draws = [(logits + low, [b + less for b in bias]) for low, less in _SHIFTS]
        wanted = [self._evaluate(site, *draw) for draw in draws]
        for attrs in self._proposals(region, layout.features[0]):
            found = Router(site.logits, site.bias, site.weight, site.index, {**site.attrs, **attrs})
            if all(self._agrees(found, layout.tokens(x), b, want) for (x, b), want in zip(draws, wanted, strict=True)):
                return found
        return None

    def _evaluate(self, site: Router, x: Tensor, bias: list[Tensor]) -> tuple[Tensor, Tensor]:
        given = {site.logits: x, **dict(zip(site.bias, bias, strict=True))}
        positions = torch.zeros(_ROWS, _LENGTH, dtype=torch.int64)
        found = evaluate(self._captured, [site.weight, site.index], positions, given=given, wide=True)
        weight, index = (self._layouts.of(n).tokens(v) for n, v in zip(site.ends, found, strict=True))  # type: ignore[union-attr]
        return weight, index

    def _agrees(self, site: Router, x: Tensor, bias: list[Tensor], want: tuple[Tensor, Tensor]) -> bool:
        """Equal up to the order of the experts, which a top-k need not sort, and over which they are summed."""
        (weight, index), (theirs, places) = (_by_expert(*r) for r in (moe.route(x, *bias, **site.attrs), want))
        return torch.equal(index, places) and self._close(weight, theirs)

    def _proposals(self, region: list[fx.Node], experts: int) -> Iterator[dict[str, Any]]:
        """Attributes that the operators of the region suggest."""
        products = dict.fromkeys([1.0, *_numbers(region, "aten::mul")])
        sums = dict.fromkeys([*_numbers(region, "aten::add"), 0.0])
        renormalised = [{"renormalise": True, **({"eps": eps} if eps else {})} for eps in sums]
        for kind, sharing, scale, groups in itertools.product(
            ("softmax", "sigmoid"), [*renormalised, {"renormalise": False}], products, self._groups(region, experts)
        ):
            yield {"kind": kind, **sharing, **({"scale": scale} if scale != 1 else {}), **groups}

    def _groups(self, region: list[fx.Node], experts: int) -> list[dict[str, int]]:
        """Ways to choose among groups of experts: none, or those of values [groups, experts of a group]."""
        found: list[dict[str, int]] = [{}]
        shapes = {n: layout.features for n in region if (layout := self._layouts.of(n)) is not None}
        for groups, size in dict.fromkeys(s for s in shapes.values() if len(s) == 2 and s[0] * s[1] == experts and s[0] > 1):
            tops = {(shapes[source], int(n.args[1])) for n in region if (source := _top_of(n)) in shapes}  # type: ignore[index, arg-type]
            best = [k for shape, k in tops if shape == (groups, size)] or [1]
            kept = [k for shape, k in tops if shape == (groups,)]
            found += [{"groups": groups, "top_groups": t, "group_best": b} for t in kept for b in best]
        return found


def _by_expert(weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    index, order = index.sort(-1)
    return weight.gather(-1, order), index


def _numbers(region: list[fx.Node], name: str) -> list[float]:
    return [float(a) for n in region if operator_name(n) == name for a in n.args if isinstance(a, float)]


def _top_of(node: fx.Node) -> fx.Node | None:
    """What a top-k looks at."""
    source = node.args[0] if operator_name(node) == "aten::topk" else None
    return source if isinstance(source, fx.Node) else None
