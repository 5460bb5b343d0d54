"""From logits to the distribution that a request samples from: penalties, temperature, top-k, top-p, min-p.

The order and the ties are those of transformers' logits processors, so that both give the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

from elision.errors import BadInput

#: Per parameter its type, range, and it in words. Logits over a temperature below 1e-30 can overflow.
_LEGAL: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda x: 1e-30 <= x < math.inf, "more than 0, or 0 for greedy"),
    "top_k": (Integral, lambda x: x >= 0, "an integer of at least 0 (0 is off)"),
    "top_p": (Real, lambda x: 0 < x <= 1, "more than 0 and at most 1 (1 is off)"),
    "min_p": (Real, lambda x: 0 <= x <= 1, "from 0 (off) to 1"),
    "repetition_penalty": (Real, lambda x: 0 < x < math.inf, "more than 0 (1 is off)"),
    "suppress": (tuple, lambda x: all(isinstance(i, Integral) for i in x), "a tuple of token ids"),
    "suppress_before": (Real, lambda x: x >= 0, "a position, or infinity for all positions"),
}


@dataclass(frozen=True)
class Warp:
    """A request's parameters. Off: ``temperature=1 top_k=0 top_p=1 min_p=0 repetition_penalty=1``.

    ``suppress``: token ids that are not drawn at positions before ``suppress_before`` (EOS, before the least
    number of new tokens). Raises BadInput naming the parameter, its value and its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppress: tuple[int, ...] = ()
    suppress_before: float = math.inf

    def __post_init__(self) -> None:
        for name, (kind, legal, expected) in _LEGAL.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not legal(value):
                raise BadInput(f"{name}={value!r}; expected {expected}")


def penalise(logits: torch.Tensor, histories: Sequence[torch.Tensor], params: Warp) -> torch.Tensor:
    """The part that greedy shares: ``logits [n, V]`` to float32 with suppressed tokens at -inf and repeated
    ones made less likely.

    ``histories[i]``: all tokens before and at node i (int64), so its length is the position of the token to
    draw. A repeated token's logit is divided by the penalty if positive, multiplied by it if negative (Keskar
    et al. 2019, CTRL). Ids beyond V (embeddings can be padded) have no logit to change.
    """
    if params.repetition_penalty == 1.0 and not params.suppress:
        return logits.float()
    out = logits.to(torch.float32, copy=True)
    banned = [i for i in params.suppress if 0 <= i < out.shape[-1]]
    for row, history in zip(out, histories, strict=True):
        if params.repetition_penalty != 1.0:
            repeated = history[history < len(row)]
            seen = row[repeated]
            penalty = params.repetition_penalty
            row[repeated] = torch.where(seen < 0, seen * penalty, seen / penalty)
        if len(history) < params.suppress_before:
            row[banned] = -torch.inf
    return out


def warp(logits: torch.Tensor, histories: Sequence[torch.Tensor], params: Warp) -> torch.Tensor:
    """Probabilities ``float32 [n, V]`` after all of the parameters; ``histories`` as for `penalise`."""
    scores = penalise(logits, histories, params)
    if params.temperature != 1.0:
        scores = scores / params.temperature
    if params.top_k:
        least = torch.topk(scores, min(params.top_k, scores.shape[-1]))[0][:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)  # keeps all that tie with the last
    if params.top_p < 1.0:
        ascending, order = torch.sort(scores)
        gone = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        gone[:, -1:] = False
        scores = scores.masked_fill(gone.scatter(1, order, gone), -torch.inf)
    if params.min_p > 0.0:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < params.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return scores.softmax(-1)
