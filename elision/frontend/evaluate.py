"""Evaluate some values of a captured graph, running only the nodes that they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from elision.frontend.capture import Captured


def evaluate(
    captured: Captured,
    nodes: Sequence[fx.Node],
    positions: Tensor,
    *,
    given: Mapping[fx.Node, Any] | None = None,
    wide: bool = False,
) -> list[Any]:
    """The values of ``nodes`` (of ``captured.graph``) for ``positions [B, T]`` (int64).

    The graph is cut at ``given``: these nodes take the given values and nothing above them runs. Weights come
    from ``captured``. All tokens are valid. Token inputs are zeros of shape ``[B, T, ...]``, so a value that depends on tokens is
    meaningful only if it is reached through ``given``. Intermediate values are freed after their last use. With
    ``wide`` weights are float64 and every cast to a float type is one to float64: the exact value of the graph.
    """
    given = given or {}
    order = _needed(nodes, given)
    readers = Counter(used for node in order if node not in given for used in set(node.all_input_nodes))
    readers.update(nodes)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), _default(torch.float64 if wide else torch.get_default_dtype()):
        for node in order:
            if node in given:
                values[node] = given[node]
            elif node.op == "placeholder":
                found = _input(captured, node, positions)
                values[node] = _widen(found) if wide else found
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                if wide:
                    args, kwargs = tree_map(_widen, (args, kwargs))
                call: Any = node.target
                if wide and call is torch.ops.aten._grouped_mm.default:
                    call = _grouped_product
                values[node] = call(*args, **kwargs)
                for used in set(node.all_input_nodes):
                    readers[used] -= 1
                    if not readers[used]:
                        del values[used]
    return [values[node] for node in nodes]


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Inside, a product of integers and a plain number has this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def ancestors(nodes: Sequence[fx.Node], given: Mapping[fx.Node, Any] | None = None) -> set[fx.Node]:
    """``nodes`` and everything that they are computed from, up to and including the nodes in ``given``."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if given is None or node not in given:
                stack.extend(node.all_input_nodes)
    return found


def _needed(nodes: Sequence[fx.Node], given: Mapping[fx.Node, Any]) -> list[fx.Node]:
    # FX nodes compare by their place in the graph, which is a topological order.
    return sorted(ancestors(nodes, given))


def _input(captured: Captured, node: fx.Node, positions: Tensor) -> Any:
    if node.name in captured.source:
        return captured.params[captured.source[node.name]]
    kind = captured.kinds.get(node.name)
    value = node.meta.get("val")
    if kind == "position":
        return positions
    if kind == "valid":
        return torch.ones_like(positions, dtype=value.dtype)  # type: ignore[union-attr]
    if not isinstance(value, Tensor):
        return value
    sizes = list(positions.shape) + [1] * value.dim()
    shape = [n if isinstance(n, int) else sizes[axis] for axis, n in enumerate(value.shape)]
    return torch.zeros(shape, dtype=value.dtype)


def _grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """``aten::_grouped_mm``, which knows no float64: rows of ``a [n, in]`` up to ``ends[e]`` times ``b [e, in, out]``."""
    starts = [0, *ends.tolist()]
    groups = [a[start:stop] @ b[e] for e, (start, stop) in enumerate(pairwise(starts))]
    return torch.cat([*groups, a.new_zeros(a.shape[0] - starts[-1], b.shape[-1])])


def _widen(value: Any) -> Any:
    """float64 for a floating dtype or tensor, complex128 for a complex one; anything else as it is."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value
    if not isinstance(value, Tensor):
        return value
    return value.double() if value.is_floating_point() else value.to(torch.complex128) if value.is_complex() else value
