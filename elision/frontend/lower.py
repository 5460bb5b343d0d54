"""Captured nodes to IR values, one by one: what is not part of an anchor.

Every rule is about one operator, never about a model. An operator without a rule becomes an opaque `aten` op between `pad` and
`unpad` if its operands are token values, and is counted in the coverage report.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from elision.errors import BadInput, UnsupportedModel
from elision.frontend.anchors import Anchor
from elision.frontend.experts import Experts, Router
from elision.frontend.normalise import operator_name
from elision.frontend.pointwise import expression
from elision.frontend.rowwise import is_rowwise
from elision.frontend.sites import AttentionSite, attention_site
from elision.frontend.structure import is_attention
from elision.frontend.token_major import Layout, Layouts
from elision.ir.expr import canonical
from elision.ir.states import KV, Dense, Float, Segment
from elision.ir.types import Tensor as TensorType
from elision.ir.types import parse_dtype
from elision.ir.value import Builder, Value

Slot = Value | tuple[Value, ...]
Region = Anchor | Experts | Router


class Lowering:
    """Lowers the nodes of one graph (a template, the prologue or the epilogue) into ``builder``.

    ``outside(node, transposed)`` gives the value of something that is not a token value (a weight, or its transpose);
    ``frequencies(cos, sin)`` those of a rotation; ``constant(node)`` is a constant's value; ``mask`` is how the graph
    names the mask of an attention node.
    ``opaque`` collects the operators without a rule.
    """

    def __init__(
        self,
        builder: Builder,
        layouts: Layouts,
        outside: Callable[[fx.Node, bool], Value],
        frequencies: Callable[[fx.Node, fx.Node], Value],
        mask: Callable[[fx.Node], Any],
        constant: Callable[[fx.Node], Tensor | None],
    ) -> None:
        self._b, self._layouts, self._outside = builder, layouts, outside
        self._frequencies, self._mask, self._constant = frequencies, mask, constant
        self._values: dict[fx.Node, Slot] = {}
        self.opaque: list[str] = []

    def give(self, node: fx.Node, value: Value) -> None:
        """The value of a node that comes from outside (the stream, the token ids)."""
        self._values[node] = value

    def value(self, node: fx.Node) -> Value:
        """The value of a node that has been lowered, or comes from outside."""
        found = self._values.get(node)
        if found is None:
            return self._outside(node, False)
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
            return list(self._b.add("route", self.value(region.logits), **region.attrs))
        operands = [self.value(n) for n in (region.x, region.weight, region.index)]
        weights = [self._outside(w, True) for w in region.products]
        biases = [self._outside(b, False) for b in region.biases]
        return [self._add("experts", *operands, *weights, *biases, **region.attrs)]

    def _anchor(self, anchor: Anchor) -> Value:
        x = self.value(anchor.start)
        if anchor.tables:
            cos, sin = anchor.tables
            return self._add(anchor.op, x, self._frequencies(cos, sin), **anchor.attrs)
        return self._add(anchor.op, x, *(self._outside(p, False) for p in anchor.params), **anchor.attrs)

    def _add(self, op: str, *args: Value, **attrs: Any) -> Value:
        found = self._b.add(op, *args, **attrs)
        assert isinstance(found, Value)
        return found

    def _lower(self, node: fx.Node) -> Slot:
        rule = _RULES.get(operator_name(node))
        if is_attention(node):
            return self._attention(attention_site(node))
        if node.target is operator.getitem:
            found = self._values[node.args[0]]  # type: ignore[index]
            assert isinstance(found, tuple)
            return found[node.args[1]]  # type: ignore[index]
        try:
            lowered = rule(self, node) if rule is not None else self._pointwise(node)
        except BadInput:
            lowered = None  # the op's own type rule refused: the operator stays opaque
        return lowered if lowered is not None else self._keep(node)

    def _attention(self, site: AttentionSite) -> Value:
        q, k, v = (self.value(n) for n in (site.q, site.k, site.v))
        (_, heads, dim), vdim = k.tensor.axes, v.tensor.axes[-1]
        assert isinstance(heads, int) and isinstance(dim, int) and isinstance(vdim, int)
        encoding = Float(k.tensor.dtype)
        cache = KV(heads, dim, vdim, (Segment(Dense(), encoding, encoding),))
        fresh = self._add("fresh", k, v, type=cache, name="kv")
        attrs: dict[str, Any] = {"mask": self._mask(site.node), "scale": site.scale}
        if site.softcap:
            attrs["softcap"] = site.softcap
        extra = [self._outside(site.sinks, False)] if site.sinks is not None else []
        if extra:
            attrs["extras"] = ("sinks",)
        return self._add("attend", q, fresh, *extra, name="o", **attrs)

    def _keep(self, node: fx.Node) -> Value:
        """The operator as it is, on padded operands."""
        name = operator_name(node).removeprefix("aten::")
        layout, value = self._layouts.of(node), node.meta.get("val")
        if (
            not operator_name(node).startswith("aten::")
            or layout is None
            or not layout.leading
            or layout.merged
            or node.kwargs
            or not isinstance(value, Tensor)
        ):
            raise UnsupportedModel(f"operator {node.target} has no rule and cannot be kept as it is: {node.format_node()}")
        operands: list[Value] = []

        def fill(item: Any) -> Any:
            if isinstance(item, fx.Node):
                given = self.value(item)
                found = self._layouts.of(item)
                if found is not None and (not found.leading or found.merged):
                    raise UnsupportedModel(f"operator {node.target} reads a transposed value and has no rule")
                operands.append(self._add("pad", given) if given.tensor.tokens is not None else given)
                return ("arg", len(operands) - 1)
            if isinstance(item, list | tuple):
                return ("list", *map(fill, item))
            return ("dtype", parse_dtype(item)) if isinstance(item, torch.dtype) else item

        template = tuple(fill(a) for a in node.args)
        first = next(v for n in node.all_input_nodes if (v := self.value(n)).tensor.tokens is not None)
        padded = next(v for v in operands if v.op == "pad")
        rows, length = padded.tensor.axes[:2]
        results = TensorType((rows, length, *layout.features), parse_dtype(value.dtype))
        overload = str(node.target).removeprefix("aten.")
        self.opaque.append(name)
        attrs: dict[str, Any] = {"function": overload, "template": template, "results": results}
        if is_rowwise(overload, template, [v.tensor for v in operands]):
            attrs["rowwise"] = True
        return self._add("unpad", first, self._add("aten", *operands, **attrs))

    # --- rules; None or BadInput means: keep the operator as it is ---

    def _linear(self, node: fx.Node) -> Value | None:
        x, w, *bias = (a for a in node.args if isinstance(a, fx.Node))
        return self._product(x, w, False, *bias)

    def _addmm(self, node: fx.Node) -> Value | None:
        bias, x, w = node.args
        assert isinstance(bias, fx.Node) and isinstance(x, fx.Node) and isinstance(w, fx.Node)
        return self._product(x, w, True, bias) if not node.kwargs else None

    def _matmul(self, node: fx.Node) -> Value | None:
        x, w = node.args
        assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
        return self._product(x, w, True) if self._layouts.of(w) is None else None

    def _product(self, x: fx.Node, w: fx.Node, transposed: bool, *bias: fx.Node) -> Value:
        """``x @ w.T + bias``; ``transposed`` if the graph has ``w`` as [in, out]."""
        args = [self.value(x), self._outside(w, transposed), *(self._outside(b, False) for b in bias)]
        weight = args[1].attr("name", "").removesuffix(".t").removesuffix(".weight").rpartition(".")[2]
        return self._add("linear", *args, name=weight.removesuffix("_proj") or "y")

    def _embedding(self, node: fx.Node) -> Value | None:
        table, ids = node.args[:2]
        assert isinstance(table, fx.Node) and isinstance(ids, fx.Node)
        return self._add("embed", self.value(ids), self._outside(table, False), name="h")

    def _reshape(self, node: fx.Node) -> Value | None:
        before, after = self._layout_of_first(node), self._layouts.of(node)
        if before is None or after is None:
            return None
        x = self.value(node.args[0])  # type: ignore[arg-type]
        if after.features == before.features and (before.merged == after.merged or before.leading and after.leading):
            return x
        return self._add("view", x, shape=after.features, name="x") if before.leading and after.leading else None

    def _same_features(self, node: fx.Node) -> Value | None:
        """A move of axes that leaves the features in order."""
        before, after = self._layout_of_first(node), self._layouts.of(node)
        if before is None or after is None:
            return None
        moved = [a for d in node.args[1:] if isinstance(d, int) and (a := before.axis(d)) is not None]
        dims = node.args[1] if isinstance(node.args[1], list | tuple) else None
        order = [a for d in dims if (a := before.axis(int(d))) is not None] if dims is not None else None  # type: ignore[arg-type]
        keeps = order == sorted(order) if order is not None else len(moved) < 2 and _adjacent(before, node.args[1:3])
        return self.value(node.args[0]) if keeps else None  # type: ignore[arg-type]

    def _cast(self, node: fx.Node) -> Value | None:
        x = self.value(node.args[0])  # type: ignore[arg-type]
        value = node.meta["val"]
        return self._add("map", x, expr="x0", dtype=parse_dtype(value.dtype)) if x.tensor.dtype != parse_dtype(value.dtype) else x

    def _slice(self, node: fx.Node) -> Value | None:
        layout = self._layout_of_first(node)
        given: tuple[Any, ...] = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
        _, dim, start, end, step = given
        if layout is None or step != 1 or not isinstance(dim, int):
            return None
        return self._cut(node, layout, dim, start or 0, end)

    def _cut(self, node: fx.Node, layout: Layout, dim: int, start: Any, end: Any) -> Value | None:
        axis = layout.axis(dim)
        if axis is None:
            return None
        start, stop, _ = slice(start, end).indices(layout.features[axis])
        back = axis - len(layout.features)
        return self._add("slice", self.value(node.args[0]), start=start, stop=stop, **({"axis": back} if back != -1 else {}))  # type: ignore[arg-type]

    def _index(self, node: fx.Node) -> Value | None:
        """One entry of one feature axis, by a constant list of one index."""
        layout = self._layout_of_first(node)
        indices = node.args[1]
        assert isinstance(indices, list | tuple)
        given = [(d, n) for d, n in enumerate(indices) if isinstance(n, fx.Node)]
        constant = self._constant(given[0][1]) if len(given) == 1 else None
        if layout is None or constant is None or constant.numel() != 1 or constant.dim() != 1:
            return None
        start = int(constant)
        return self._cut(node, layout, given[0][0], start, start + 1 or None)

    def _pieces(self, node: fx.Node) -> Slot | None:
        layout = self._layout_of_first(node)
        parts = node.meta["val"]
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        if layout is None or not isinstance(dim, int):
            return None
        cuts: list[Value] = []
        start = 0
        for part in parts:
            size = part.shape[dim]
            cut = self._cut(node, layout, dim, start, start + size) if isinstance(size, int) else None
            if cut is None:
                return None
            cuts.append(cut)
            start += size
        return tuple(cuts)

    def _concat(self, node: fx.Node) -> Value | None:
        parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        after = self._layouts.of(node)
        if after is None or not isinstance(dim, int) or after.axis(dim) != len(after.features) - 1:
            return None
        return self._add("concat", *(self.value(p) for p in parts))  # type: ignore[union-attr, arg-type]

    def _layer_norm(self, node: fx.Node) -> Value | None:
        x, shape, *rest = node.args
        if not isinstance(shape, list | tuple) or len(shape) != 1 or not isinstance(x, fx.Node):
            return None
        weights = [self._outside(w, False) for w in rest[:2] if isinstance(w, fx.Node)]
        eps = rest[2] if len(rest) > 2 else 1e-5
        return self._add("norm", self.value(x), *weights, kind="layer", eps=eps, cast="late")

    def _pointwise(self, node: fx.Node) -> Value | None:
        operands: list[Value] = []

        def text(operand: fx.Node) -> str:
            operands.append(self.value(operand))
            return f"x{len(operands) - 1}"

        expr = expression(node, text)
        if expr is None:
            return None
        dtype = parse_dtype(node.meta["val"].dtype)
        cast = {"dtype": dtype} if {v.tensor.dtype for v in operands} != {dtype} else {}
        return self._add("map", *operands, expr=canonical(expr), **cast)

    def _mean(self, node: fx.Node) -> Value | None:
        layout = self._layout_of_first(node)
        dims = node.args[1]
        one = isinstance(dims, list | tuple) and len(dims) == 1 and isinstance(dims[0], int)
        if layout is None or not one or layout.axis(dims[0]) != len(layout.features) - 1:  # type: ignore[index, arg-type]
            return None
        keepdim = bool(node.args[2]) if len(node.args) > 2 else False
        kind = operator_name(node).removeprefix("aten::").replace("amax", "max")
        return self._add("reduce", self.value(node.args[0]), kind=kind, keepdim=keepdim)  # type: ignore[arg-type]

    def _layout_of_first(self, node: fx.Node) -> Layout | None:
        first = node.args[0]
        return self._layouts.of(first) if isinstance(first, fx.Node) else None


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


def _adjacent(before: Layout, dims: tuple[Any, ...]) -> bool:
    """Swapping these two axes leaves the features in order: no feature other than the one moved lies between them."""
    low, high = sorted(int(d) % before.rank for d in dims)
    return not any(before.axis(d) is not None for d in range(low + 1, high)) or all(before.axis(d) is None for d in (low, high))


_RULES: dict[str, Callable[[Lowering, fx.Node], Slot | None]] = {
    "aten::linear": Lowering._linear,
    "aten::addmm": Lowering._addmm,
    "aten::matmul": Lowering._matmul,
    "aten::layer_norm": Lowering._layer_norm,
    "aten::embedding": Lowering._embedding,
    "aten::reshape": Lowering._reshape,
    "aten::flatten": Lowering._reshape,
    "aten::unsqueeze": Lowering._reshape,
    "aten::transpose": Lowering._same_features,
    "aten::permute": Lowering._same_features,
    "aten::to": Lowering._cast,
    "aten::_to_copy": Lowering._cast,
    "aten::slice": Lowering._slice,
    "aten::index": Lowering._index,
    "aten::split": Lowering._pieces,
    "aten::split_with_sizes": Lowering._pieces,
    "aten::chunk": Lowering._pieces,
    "aten::cat": Lowering._concat,
    "aten::mean": Lowering._mean,
    "aten::sum": Lowering._mean,
    "aten::amax": Lowering._mean,
}
