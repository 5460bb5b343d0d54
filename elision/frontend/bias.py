"""What is added to the scores of attention: a mask and, with ALiBi, a slope per head times the key's position.

Both are found by evaluation. A softmax does not change when a constant is added to a row, so ``slope * j`` and
``slope * (j - i)`` are one and the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from elision.errors import UnsupportedModel
from elision.frontend.capture import Captured
from elision.frontend.classify import HIDDEN, Mask, classify_mask
from elision.frontend.evaluate import evaluate
from elision.frontend.padding import check_padding
from elision.ir.mask import Mask as IRMask

_LENGTH = 20


@dataclass(frozen=True, eq=False)
class Bias:
    """``slopes [H]`` (Press et al. 2022) as the model computes them, and ``exact`` with float casts widened; None without."""

    mask: Mask
    slopes: Tensor | None
    exact: Tensor | None


class Biases:
    """The biases of a captured model whose longest sequence is ``limit``, each classified once; ``length``: the only length
    there is, for a graph of one length."""

    def __init__(self, captured: Captured, limit: int, length: int = 0) -> None:
        self._captured, self._limit, self._length = captured, limit, length
        self._found: dict[fx.Node, Bias] = {}

    def of(self, node: fx.Node) -> Bias:
        """What a position-only value adds to scores. Raises UnsupportedModel if it is not a mask, with ALiBi at most."""
        if node not in self._found:
            found = classify_bias(self._captured, node, limit=self._limit, length=self._length)
            if found is None:
                raise UnsupportedModel(
                    "an attention mask is neither full, causal, a window nor chunks, with ALiBi at most; a mask is never dropped"
                )
            check_padding(self._captured, node, IRMask(found.mask.kind, found.mask.size), found.slopes)
            self._found[node] = found
        return self._found[node]


def classify_bias(captured: Captured, node: fx.Node, *, limit: int, length: int = 0) -> Bias | None:
    """What a position-only value is, added to scores ``[B, H, T, T]``; None if it is not a mask and ALiBi at most."""
    size = length or min(_LENGTH, captured.longest)
    exact = _slopes(captured, node, size, wide=True)
    slopes = _slopes(captured, node, size, wide=False) if exact is not None else None
    mask = classify_mask(captured, node, limit=limit, length=length, slopes=slopes)
    return Bias(mask, slopes, exact) if mask is not None else None


def _slopes(captured: Captured, node: fx.Node, length: int, wide: bool) -> Tensor | None:
    """The slope of each head, from the keys that the last query sees; None where there is none."""
    positions = torch.arange(length).expand(1, length).contiguous()
    (bias,) = evaluate(captured, [node], positions, wide=wide)
    if bias.dim() < 3 or not bias.is_floating_point() or bias.shape[-1] != length:
        return None
    rows = bias.reshape(-1, *bias.shape[-2:]).double()
    row = rows[:, -1]
    seen = row > row.amax(-1, keepdim=True) - HIDDEN
    # A model multiplies slopes with positions or with distances: the step from 0 to 1 or the last one is not rounded.
    steps = torch.stack((rows[:, min(1, rows.shape[1] - 1), :2].diff(dim=-1)[:, 0], row[:, -2:].diff(dim=-1)[:, 0]))
    if not bool((steps[1].abs() < HIDDEN).all()) or not bool(steps[1].any()):
        return None
    line = row[:, -1:] + steps[..., None] * torch.arange(1 - length, 1)
    error = (row - line).abs().masked_fill(~seen, 0).amax(-1)
    return torch.where(error[0] <= error[1], steps[0], steps[1]).to(bias.dtype)
