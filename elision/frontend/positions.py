"""What a model reads by position: rows of a learned table, or another function of the position. Found by evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from elision.frontend.capture import Captured
from elision.frontend.evaluate import evaluate
from elision.frontend.token_major import check_tokens


def offset_of(captured: Captured, index: fx.Node) -> int | None:
    """What a position-only index is more than the position, if it is a constant."""
    offsets: set[int] = set()
    for first in (0, 3):
        positions, _ = check_tokens(2, 5, first)
        found = evaluate(captured, [index], positions)[0]
        offsets.update((found - torch.arange(5) - _start(captured, first)).flatten().tolist())
    return offsets.pop() if len(offsets) == 1 else None


def table_of(captured: Captured, node: fx.Node, count: int) -> Tensor | None:
    """The values ``[count, width]`` of a position-only ``[.., T, width]`` at the positions from 0 on, if it is a function of
    the position alone."""
    try:
        whole, some = (evaluate(captured, [node], check_tokens(1, n, first)[0])[0] for n, first in ((count, 0), (5, 3)))
    except (RuntimeError, IndexError):  # of a table that is shorter
        return None
    if whole.dim() < 2 or whole.shape[-2] != count or whole.numel() != count * whole.shape[-1]:
        return None
    rows, first = whole.reshape(count, -1), _start(captured, 3)
    return rows if torch.equal(rows[first : first + 5], some.reshape(5, -1)) else None


def _start(captured: Captured, first: int) -> int:
    """The first position: without positions given, a model counts from 0."""
    return first if "position" in captured.kinds.values() else 0
