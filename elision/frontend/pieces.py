"""A value that is written piece by piece (``x[..., :n] = a; x[..., n:] = b``) is the concatenation of its pieces."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import fx


def join_pieces(graph: fx.Graph) -> None:
    """Chains of ``slice_scatter`` whose slices make up the whole become one ``cat``; what they were written over is not read."""
    for node in list(graph.nodes):
        pieces = _pieces(node)
        if pieces is None:
            continue
        dim, parts = pieces
        with graph.inserting_before(node):
            joined = graph.call_function(torch.ops.aten.cat.default, (parts, dim))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def _pieces(node: fx.Node) -> tuple[int, list[fx.Node]] | None:
    """The axis along which the value is written and its pieces in order; None if they overlap or leave something out."""
    if not _is_write(node):
        return None
    value, dim = node.meta["val"], _arguments(node)[0] % node.meta["val"].dim()
    size = value.shape[dim]
    found: dict[tuple[int, int], fx.Node] = {}
    while isinstance(size, int) and _is_write(node) and _arguments(node)[0] % value.dim() == dim:
        _, start, end, step = _arguments(node)
        base, piece = node.args[:2]
        if step != 1 or not isinstance(base, fx.Node) or not isinstance(piece, fx.Node):
            return None
        if not all(isinstance(n, int | None) for n in (start, end)) or piece.meta["val"].dtype != value.dtype:
            return None
        begin, stop, _ = slice(start, end).indices(size)
        found[begin, stop] = piece
        places = sorted(found)
        if any(a[1] > b[0] for a, b in pairwise(places)):
            return None
        if sum(b - a for a, b in places) == size:
            return dim, [found[place] for place in places]
        node = base
    return None


def _is_write(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.slice_scatter.default


def _arguments(node: fx.Node) -> tuple[int, int | None, int | None, int]:
    """Axis, start, end and step of a ``slice_scatter``."""
    given = (*node.args[2:], *(0, None, None, 1)[len(node.args) - 2 :])
    named = dict(zip(("dim", "start", "end", "step"), given, strict=True)) | node.kwargs
    return named["dim"], named["start"], named["end"], named["step"]  # type: ignore[return-value]
