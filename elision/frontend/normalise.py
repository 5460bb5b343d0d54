"""A captured graph in normal form: no operators that do nothing, no common sub-expressions, no dead code, no value written in
pieces.

The graph stays at the level of torch operators (``linear`` is not decomposed). In-place operators are gone
before this step (capture functionalises). Views become ``reshape``: once copies that only change strides are
removed, ``view`` may be illegal where ``reshape`` never is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, fx

from elision.frontend.pieces import join_pieces

aten = torch.ops.aten

# Checks that hold for every input of a graph that was captured with dynamic shapes.
_CHECKS = {
    "aten::_assert_async", "aten::_assert_scalar", "aten::_assert_tensor_metadata",
    "aten::sym_constrain_range", "aten::sym_constrain_range_for_size",
}  # fmt: skip
# Identities on values, whatever their other arguments are.
_IDENTITIES = {
    "aten::alias", "aten::clone", "aten::contiguous", "aten::detach",
    "aten::lift_fresh_copy", "aten::positive",
}  # fmt: skip
_CASTS = {"aten::to", "aten::_to_copy", "aten::type_as", "aten::view_as", "aten::expand_as", "aten::copy"}
_VIEWS = {"aten::view", "aten::reshape", "aten::_unsafe_view", "aten::expand"}


def normalise(graph: fx.Graph) -> fx.Graph:
    """A new graph that computes the same values. ``meta["val"]`` is kept; placeholders keep their names."""
    out = fx.Graph()
    out.output(out.graph_copy(graph, {}))
    for node in list(out.nodes):
        if node.op != "call_function":
            continue
        if operator_name(node) in _CHECKS or node.target is torch._check:
            out.erase_node(node)
            continue
        same = _identity_of(node)
        if same is not None:
            node.replace_all_uses_with(same)
            out.erase_node(node)
        elif operator_name(node) in ("aten::view", "aten::_unsafe_view"):
            node.target = aten.reshape.default
    join_pieces(out)
    _share(out)
    out.eliminate_dead_code()
    out.lint()
    return out


def operator_name(node: fx.Node) -> str:
    """``namespace::name`` of the operator that ``node`` calls, without overload; "" for other callables."""
    schema = getattr(node.target, "_schema", None)
    return schema.name if node.op == "call_function" and schema is not None else ""


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The argument that ``node`` returns unchanged, or None."""
    name = operator_name(node)
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if name in _IDENTITIES:
        return first
    if name == "aten::dropout" and (node.args[1] == 0 or not node.args[2]):
        return first
    if name == "aten::copy" and isinstance(node.args[1], fx.Node):
        first = node.args[1]  # written over the first operand
    before, after = first.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if name in _CASTS | _VIEWS:
        return first if _is_alike(first, after) else None
    if name in ("aten::slice", "aten::slice_scatter"):
        operands = 1 if name == "aten::slice" else 2
        given: tuple[Any, ...] = (*node.args[operands:], *(0, None, None, 1)[len(node.args) - operands :])
        _, start, end, step = given
        whole = end is None or (isinstance(end, int) and end == sys.maxsize)
        same: Any = node.args[operands - 1]  # the second of a slice_scatter is written over the first
        return same if start in (0, None) and whole and step == 1 and _is_alike(same, after) else None
    return None


def _is_alike(node: Any, value: Tensor) -> bool:
    """The node's value has the dtype, device and shape of this one."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(found, Tensor):
        return False
    return found.dtype == value.dtype and found.device == value.device and _same_shape(found, value)


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() and all(_size(x) == _size(y) for x, y in zip(a.shape, b.shape, strict=True))


def _size(n: Any) -> Any:
    """A size as a plain int or as its symbolic expression (comparing SymInts would add guards)."""
    return n if isinstance(n, int) else n.node.expr


def _share(graph: fx.Graph) -> None:
    """Common sub-expression elimination; values of symbolic sizes are shared by their expression."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.is_impure() or _is_random(node):
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            key: Any = ("size", _size(value))
        else:
            key = (node.target, _key(node.args), _key(node.kwargs))
        owner = seen.setdefault(key, node)
        if owner is not node:
            node.replace_all_uses_with(owner)
            graph.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_key(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _key(v)) for k, v in value.items()))
    # 1, 1.0 and True are equal in Python and different to an operator; repr also tells 0.0 from -0.0.
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
