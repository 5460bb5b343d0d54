"""Captured nodes to IR values, one by one: what is not part of an anchor.

The rules are in `operators`. An operator without a rule becomes an opaque `aten` op between `pad` and `unpad`, and is counted
in the coverage report.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from elision.errors import BadInput
from elision.frontend.anchors import Anchor
from elision.frontend.dense_experts import DenseExperts
from elision.frontend.experts import Experts
from elision.frontend.normalise import operator_name
from elision.frontend.opaque import keep
from elision.frontend.operators import RULES, pointwise
from elision.frontend.routers import Router
from elision.frontend.sites import AttentionSite, attention_site
from elision.frontend.structure import is_attention
from elision.frontend.token_major import Layouts
from elision.ir.states import KV, Dense, Float, Segment
from elision.ir.value import Builder, Value

Slot = Value | tuple[Value, ...]
Region = Anchor | Experts | DenseExperts | Router


class Lowering:
    """Lowers the nodes of one graph (a template, the prologue or the epilogue) into ``builder``.

    ``outside(node, transposed)`` gives the value of something that is not a token value (a weight, or its transpose);
    ``frequencies(cos, sin)`` those of a rotation; ``constant(node)`` is a constant's value; ``mask`` is how the graph
    names the mask of an attention node, and ``slopes`` the ALiBi slopes of a site, if it has them.
    """

    def __init__(
        self,
        builder: Builder,
        layouts: Layouts,
        outside: Callable[[fx.Node, bool], Value],
        frequencies: Callable[[fx.Node, fx.Node], Value],
        mask: Callable[[fx.Node], Any],
        slopes: Callable[[AttentionSite], Value | None],
        constant: Callable[[fx.Node], Tensor | None],
    ) -> None:
        self._b, self.layouts, self.outside = builder, layouts, outside
        self._frequencies, self._mask, self._slopes, self.constant = frequencies, mask, slopes, constant
        self._values: dict[fx.Node, Slot] = {}

    def give(self, node: fx.Node, value: Value) -> None:
        """The value of a node that comes from outside (the stream, the token ids)."""
        self._values[node] = value

    def value(self, node: fx.Node) -> Value:
        """The value of a node that has been lowered, or comes from outside."""
        found = self._values.get(node)
        if found is None:
            return self.outside(node, False)
        assert isinstance(found, Value)
        return found

    def run(self, nodes: tuple[fx.Node, ...], found: list[Region], result: fx.Node) -> Value:
        """Lower what ``result`` needs of the nodes, in order, every region as one op; the value of ``result``."""
        reads = {end: region.reads for region in found for end in region.ends}
        owner = {end: region for region in found for end in region.ends}
        needed = _needed(nodes, reads, result)
        for node in nodes:
            if node in needed and node not in self._values:
                if node in owner:
                    self._values.update(zip(owner[node].ends, self._region(owner[node]), strict=True))
                else:
                    self._values[node] = self._lower(node)
        return self.value(result)

    def _region(self, region: Region) -> list[Value]:
        if isinstance(region, Anchor):
            return [self._anchor(region)]
        if isinstance(region, Router):
            bias = [self.outside(b, False) for b in region.bias]
            return list(self._b.add("route", self.value(region.logits), *bias, **region.attrs))
        if isinstance(region, DenseExperts):
            gates = self._b.add("route", self.value(region.logits), **region.routing)
            weights = [self.outside(w, True) for w in region.products]
            return [self.add("experts", self.value(region.x), *gates, *weights, **region.attrs)]
        operands = [self.value(n) for n in (region.x, region.weight, region.index)]
        weights = [self.outside(w, True) for w in region.products]
        biases = [self.outside(b, False) for b in region.biases]
        return [self.add("experts", *operands, *weights, *biases, **region.attrs)]

    def _anchor(self, anchor: Anchor) -> Value:
        x = self.value(anchor.start)
        if anchor.tables:
            cos, sin = anchor.tables
            return self.add(anchor.op, x, self._frequencies(cos, sin), **anchor.attrs)
        return self.add(anchor.op, x, *(self.outside(p, False) for p in anchor.params), **anchor.attrs)

    def add(self, op: str, *args: Value, **attrs: Any) -> Value:
        """An op with one result."""
        found = self._b.add(op, *args, **attrs)
        assert isinstance(found, Value)
        return found

    def _lower(self, node: fx.Node) -> Slot:
        rule = RULES.get(operator_name(node), pointwise)
        if is_attention(node):
            return self._attention(attention_site(node))
        if node.target is operator.getitem:
            found = self._values[node.args[0]]  # type: ignore[index]
            assert isinstance(found, tuple)
            return found[node.args[1]]  # type: ignore[index]
        try:
            lowered = rule(self, node)
        except BadInput:
            lowered = None  # the op's own type rule refused: the operator stays opaque
        return lowered if lowered is not None else keep(self, node)

    def _attention(self, site: AttentionSite) -> Value:
        q, k, v = (self.value(n) for n in (site.q, site.k, site.v))
        (_, heads, dim), vdim = k.tensor.axes, v.tensor.axes[-1]
        assert isinstance(heads, int) and isinstance(dim, int) and isinstance(vdim, int)
        encoding = Float(k.tensor.dtype)
        cache = KV(heads, dim, vdim, (Segment(Dense(), encoding, encoding),))
        fresh = self.add("fresh", k, v, type=cache, name="kv")
        attrs: dict[str, Any] = {"mask": self._mask(site.node), "scale": site.scale}
        if site.softcap:
            attrs["softcap"] = site.softcap
        slopes = self._slopes(site)
        extra = {} if site.sinks is None else {"sinks": self.outside(site.sinks, False)}
        extra |= {} if slopes is None else {"slopes": slopes}
        if extra:
            attrs["extras"] = tuple(extra)
        return self.add("attend", q, fresh, *extra.values(), name="o", **attrs)


def _needed(nodes: tuple[fx.Node, ...], reads: dict[fx.Node, tuple[fx.Node, ...]], result: fx.Node) -> set[fx.Node]:
    """The nodes that ``result`` needs, back to where the graph begins, past the inside of regions."""
    inside, found = set(nodes), set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node in inside and node not in found:
            found.add(node)
            stack.extend(reads[node] if node in reads else node.all_input_nodes)
    return found
