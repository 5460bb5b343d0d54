"""What each operator is in the IR. Every rule is about one operator, never about a model.

A rule gives the value, or a tuple of them; None (or a BadInput of the op's own type rule) means that the IR cannot say
it, and the operator stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx

from elision.frontend.normalise import operator_name
from elision.frontend.pointwise import expression
from elision.frontend.token_major import Layout
from elision.ir.expr import canonical
from elision.ir.types import parse_dtype
from elision.ir.value import Value

if TYPE_CHECKING:
    from elision.frontend.lower import Lowering, Slot


def _linear(low: Lowering, node: fx.Node) -> Value | None:
    x, w, *bias = (a for a in node.args if isinstance(a, fx.Node))
    return _product(low, x, w, False, *bias)


def _addmm(low: Lowering, node: fx.Node) -> Value | None:
    bias, x, w = node.args
    assert isinstance(bias, fx.Node) and isinstance(x, fx.Node) and isinstance(w, fx.Node)
    return _product(low, x, w, True, bias) if not node.kwargs else None


def _matmul(low: Lowering, node: fx.Node) -> Value | None:
    x, w = node.args
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    return _product(low, x, w, True) if low.layouts.of(w) is None else None


def _product(low: Lowering, x: fx.Node, w: fx.Node, transposed: bool, *bias: fx.Node) -> Value:
    """``x @ w.T + bias``; ``transposed`` if the graph has ``w`` as [in, out]."""
    args = [low.value(x), low.outside(w, transposed), *(low.outside(b, False) for b in bias)]
    weight = args[1].attr("name", "").removesuffix(".t").removesuffix(".weight").rpartition(".")[2]
    return low.add("linear", *args, name=weight.removesuffix("_proj") or "y")


def _embedding(low: Lowering, node: fx.Node) -> Value | None:
    table, ids = node.args[:2]
    assert isinstance(table, fx.Node) and isinstance(ids, fx.Node)
    return low.add("embed", low.value(ids), low.outside(table, False), name="h")


def _reshape(low: Lowering, node: fx.Node) -> Value | None:
    before, after = _layout_of_first(low, node), low.layouts.of(node)
    if before is None or after is None:
        return None
    x = low.value(node.args[0])  # type: ignore[arg-type]
    if after.features == before.features and (before.merged == after.merged or before.flat and after.flat):
        return x
    return low.add("view", x, shape=after.features, name="x") if before.flat and after.flat else None


def _same_features(low: Lowering, node: fx.Node) -> Value | None:
    """A move of axes that leaves the features in order."""
    before, after = _layout_of_first(low, node), low.layouts.of(node)
    if before is None or after is None:
        return None
    moved = [a for d in node.args[1:] if isinstance(d, int) and (a := before.axis(d)) is not None]
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else None
    order = [a for d in dims if (a := before.axis(int(d))) is not None] if dims is not None else None  # type: ignore[arg-type]
    keeps = order == sorted(order) if order is not None else len(moved) < 2 and _adjacent(before, node.args[1:3])
    return low.value(node.args[0]) if keeps else None  # type: ignore[arg-type]


def _expand(low: Lowering, node: fx.Node) -> Value | None:
    """Features of size 1 repeated, as many as before."""
    after = low.layouts.of(node)
    return low.add("expand", low.value(node.args[0]), shape=after.features, name="x") if after is not None else None  # type: ignore[arg-type]


def _cast(low: Lowering, node: fx.Node) -> Value | None:
    x = low.value(node.args[0])  # type: ignore[arg-type]
    value = node.meta["val"]
    return low.add("map", x, expr="x0", dtype=parse_dtype(value.dtype)) if x.tensor.dtype != parse_dtype(value.dtype) else x


def _slice(low: Lowering, node: fx.Node) -> Value | None:
    layout = _layout_of_first(low, node)
    given: tuple[Any, ...] = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    _, dim, start, end, step = given
    if layout is None or step != 1 or not isinstance(dim, int):
        return None
    return _cut(low, node, layout, dim, start or 0, end)


def _features(low: Lowering, node: fx.Node) -> Value | None:
    """Features of size 1 come or go: their order, and the token axis, stay."""
    after = low.layouts.of(node)
    return low.add("view", low.value(node.args[0]), shape=after.features, name="x") if after is not None else None  # type: ignore[arg-type]


def _select(low: Lowering, node: fx.Node) -> Value | None:
    """One entry of a feature axis, or the first token of every sequence."""
    layout, after = _layout_of_first(low, node), low.layouts.of(node)
    x, dim, index = node.args
    if layout is None or not isinstance(dim, int) or not isinstance(index, int):
        return None
    if not layout.merged and dim % layout.rank == layout.length and index == 0:
        tokens = low.value(x)  # type: ignore[arg-type]
        return low.add("restrict", tokens, low.add("first", tokens, axis="first", name="first"), name="h")
    cut = _cut(low, node, layout, dim, index, index + 1 or None)
    return low.add("view", cut, shape=after.features, name="x") if cut is not None and after is not None else None


def _unbind(low: Lowering, node: fx.Node) -> Slot | None:
    layout = _layout_of_first(low, node)
    dim = node.args[1] if len(node.args) > 1 else 0
    if layout is None or not isinstance(dim, int) or (axis := layout.axis(dim)) is None:
        return None
    shape = (*layout.features[:axis], *layout.features[axis + 1 :])
    cuts = [_cut(low, node, layout, dim, i, i + 1) for i in range(layout.features[axis])]
    return tuple(low.add("view", cut, shape=shape, name="x") for cut in cuts if cut is not None)


def _cut(low: Lowering, node: fx.Node, layout: Layout, dim: int, start: Any, end: Any) -> Value | None:
    axis = layout.axis(dim)
    if axis is None:
        return None
    start, stop, _ = slice(start, end).indices(layout.features[axis])
    back = axis - len(layout.features)
    return low.add("slice", low.value(node.args[0]), start=start, stop=stop, **({"axis": back} if back != -1 else {}))  # type: ignore[arg-type]


def _index(low: Lowering, node: fx.Node) -> Value | None:
    """One entry of one feature axis, by a constant list of one index."""
    layout = _layout_of_first(low, node)
    indices = node.args[1]
    assert isinstance(indices, list | tuple)
    given = [(d, n) for d, n in enumerate(indices) if isinstance(n, fx.Node)]
    constant = low.constant(given[0][1]) if len(given) == 1 else None
    if layout is None or constant is None or constant.numel() != 1 or constant.dim() != 1:
        return None
    start = int(constant)
    return _cut(low, node, layout, given[0][0], start, start + 1 or None)


def _pieces(low: Lowering, node: fx.Node) -> Slot | None:
    layout = _layout_of_first(low, node)
    parts = node.meta["val"]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if layout is None or not isinstance(dim, int):
        return None
    cuts: list[Value] = []
    start = 0
    for part in parts:
        size = part.shape[dim]
        cut = _cut(low, node, layout, dim, start, start + size) if isinstance(size, int) else None
        if cut is None:
            return None
        cuts.append(cut)
        start += size
    return tuple(cuts)


def _concat(low: Lowering, node: fx.Node) -> Value | None:
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    after = low.layouts.of(node)
    if after is None or not isinstance(dim, int) or after.axis(dim) != len(after.features) - 1:
        return None
    return low.add("concat", *(low.value(p) for p in parts))  # type: ignore[union-attr, arg-type]


def _layer_norm(low: Lowering, node: fx.Node) -> Value | None:
    x, shape, *rest = node.args
    if not isinstance(shape, list | tuple) or len(shape) != 1 or not isinstance(x, fx.Node):
        return None
    weights = [low.outside(w, False) for w in rest[:2] if isinstance(w, fx.Node)]
    eps = rest[2] if len(rest) > 2 else 1e-5
    return low.add("norm", low.value(x), *weights, kind="layer", eps=eps, cast="late")


def pointwise(low: Lowering, node: fx.Node) -> Value | None:
    operands: list[Value] = []

    def text(operand: fx.Node) -> str:
        operands.append(low.value(operand))
        return f"x{len(operands) - 1}"

    expr = expression(node, text)
    if expr is None:
        return None
    dtype = parse_dtype(node.meta["val"].dtype)
    cast = {"dtype": dtype} if {v.tensor.dtype for v in operands} != {dtype} else {}
    return low.add("map", *operands, expr=canonical(expr), **cast)


def _mean(low: Lowering, node: fx.Node) -> Value | None:
    layout = _layout_of_first(low, node)
    dims = node.args[1]
    one = isinstance(dims, list | tuple) and len(dims) == 1 and isinstance(dims[0], int)
    if layout is None or not one or layout.axis(dims[0]) != len(layout.features) - 1:  # type: ignore[index, arg-type]
        return None
    keepdim = bool(node.args[2]) if len(node.args) > 2 else False
    kind = operator_name(node).removeprefix("aten::").replace("amax", "max")
    return low.add("reduce", low.value(node.args[0]), kind=kind, keepdim=keepdim)  # type: ignore[arg-type]


def _layout_of_first(low: Lowering, node: fx.Node) -> Layout | None:
    first = node.args[0]
    return low.layouts.of(first) if isinstance(first, fx.Node) else None


def _adjacent(before: Layout, dims: tuple[Any, ...]) -> bool:
    """Swapping these two axes leaves the features in order: no feature other than the one moved lies between them."""
    low, high = sorted(int(d) % before.rank for d in dims)
    return not any(before.axis(d) is not None for d in range(low + 1, high)) or all(before.axis(d) is None for d in (low, high))


RULES: dict[str, Callable[[Lowering, fx.Node], Slot | None]] = {
    "aten::linear": _linear,
    "aten::addmm": _addmm,
    "aten::matmul": _matmul,
    "aten::layer_norm": _layer_norm,
    "aten::embedding": _embedding,
    "aten::reshape": _reshape,
    "aten::flatten": _reshape,
    "aten::unsqueeze": _features,
    "aten::squeeze": _features,
    "aten::select": _select,
    "aten::unbind": _unbind,
    "aten::expand": _expand,
    "aten::transpose": _same_features,
    "aten::permute": _same_features,
    "aten::to": _cast,
    "aten::_to_copy": _cast,
    "aten::type_as": _cast,
    "aten::slice": _slice,
    "aten::index": _index,
    "aten::split": _pieces,
    "aten::split_with_sizes": _pieces,
    "aten::chunk": _pieces,
    "aten::cat": _concat,
    "aten::mean": _mean,
    "aten::sum": _mean,
    "aten::amax": _mean,
}
