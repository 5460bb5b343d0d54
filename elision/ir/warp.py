"""From logits to the distribution that a request samples from: penalties, temperature, top-k, top-p, min-p.

The order and the ties are those of transformers' logits processors, so that both give the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elision.errors import BadInput


@dataclass(frozen=True)
class Warp:
    """A request's parameters. Off: ``temperature=1 top_k=0 top_p=1 min_p=0 repetition_penalty=1``.

    ``suppress``: token ids that cannot be drawn. Raises BadInput naming the parameter, its value and its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppress: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, legal, range_ in (
            ("temperature", math.isfinite(self.temperature) and self.temperature > 0, "more than 0, or 0 for greedy"),
            ("top_k", self.top_k >= 0 and int(self.top_k) == self.top_k, "an integer of at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1 (1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "more than 0 (1 is off)"),
        ):
            if not legal:
                raise BadInput(f"{name}={getattr(self, name)!r}; expected {range_}")


def penalise(logits: torch.Tensor, histories: Sequence[torch.Tensor], params: Warp) -> torch.Tensor:
    """The part that greedy shares: ``logits [n, V]`` with suppressed tokens at -inf and repeated tokens made less likely.

    ``histories[i]``: the tokens before and at node i (int64). A repeated token's logit is divided by the penalty if positive,
    multiplied by it if negative (Keskar et al. 2019, CTRL).
    """
    if params.repetition_penalty == 1.0 and not params.suppress:
        return logits
    out = logits.clone()
    if params.repetition_penalty != 1.0:
        for row, history in zip(out, histories, strict=True):
            seen = row[history]
            row[history] = torch.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty)
    if params.suppress:
        out[:, list(params.suppress)] = -torch.inf
    return out


def warp(logits: torch.Tensor, histories: Sequence[torch.Tensor], params: Warp) -> torch.Tensor:
    """Probabilities ``float32 [n, V]`` after all of the request's parameters."""
    scores = penalise(logits.float(), histories, params)
    if params.temperature != 1.0:
        scores = scores / params.temperature
    if params.top_k:
        least = torch.topk(scores, min(params.top_k, scores.shape[-1]))[0][:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if params.top_p < 1.0:
        ascending, order = torch.sort(scores, descending=False)
        gone = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        gone[:, -1:] = False
        scores = scores.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    if params.min_p > 0.0:
        p = scores.softmax(-1)
        gone = p < params.min_p * p.amax(-1, keepdim=True)
        best = scores.argmax(-1, keepdim=True)
        scores = scores.masked_fill(gone.scatter(1, best, False), -torch.inf)
    return scores.softmax(-1)
