"""SmoothQuant+: four-bit weights after the outliers of activations moved into them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from elision.errors import BadInput
from elision.ir.program import Program, Weights
from elision.ir.retype import store
from elision.ir.weights import Int4
from elision.passes.base import register
from elision.passes.calibration import Calibrated, Text, run_score
from elision.passes.weights.chosen import chosen
from elision.passes.weights.smooth import Smoothed, maxima, scales, smoothable

log = logging.getLogger("elision")

#: What is searched: strengths from 0 to 1, and None for scales of 1.
GRID: tuple[float | None, ...] = (None, *(round(0.05 * i, 2) for i in range(21)))


@register
@dataclass(frozen=True)
class SmoothQuantPlus(Calibrated):
    """Store float weights of blocks as four-bit codes, after moving the outliers of activations into the weights (SmoothQuant+,
    Pan et al. 2023).

    The rewrite in one sentence: the gain of every norm that only linears read is divided by s_j = max|X_j|^a / max|W_j|^(1 - a)
    over calibration text and the linears' inputs j are multiplied by it, which changes nothing; then the weights that one
    `linear` of a block reads are rounded as by int4. Embeddings, heads, experts and shared weights stay: put int4 or int8 after
    it for these. ``group``: weights along the inputs that share an fp16 scale and minimum. ``alpha``: a, one for the model; or
    ``search`` for the best of 0, 0.05, .. 1 and of no scales, by the error of the logits on the text. ``tokens``: about how
    many to calibrate on, in sequences of 512.
    """

    group: int = 32
    alpha: float | str = "search"
    tokens: int = 1024

    name: ClassVar[str] = "smoothquant-plus"
    family: ClassVar[str] = "weights"
    changes: ClassVar[str] = "encodings"

    def apply(self, program: Program) -> None:
        if isinstance(self.alpha, str) and self.alpha != "search" or not isinstance(self.alpha, str) and not 0 <= self.alpha <= 1:
            raise BadInput(f"smoothquant-plus: alpha={self.alpha}; expected a number from 0 to 1, or search")
        linears = chosen(program, Int4(self.group), self.text())
        if not smoothable(program, linears):
            raise BadInput(f"smoothquant-plus: {program.name} has no norm that only linears of their own weights read; use int4")
        store(program, dict.fromkeys(linears, Int4(self.group)))

    def calibrate(self, program: Program, weights: Weights, text: Text) -> dict[str, torch.Tensor]:
        """The search holds the logits of all tokens and a float copy of the weights; it runs the model 24 times."""
        encoding = Int4(self.group)
        linears = chosen(program, encoding, self.text())
        norms, sequences = smoothable(program, linears), text.sequences(program, self.tokens)
        plain = {name: weights[name].clone() for name in linears}  # tied in memory or not, each has an object of its own
        most = maxima(program, {**weights, **plain}, sequences, [norm.linears[0] for norm in norms])
        if isinstance(self.alpha, str):
            search = _Search(program, weights, sequences, encoding, linears)
            losses = {alpha: search.loss(_folded(norms, weights, most, alpha)) for alpha in GRID}
            alpha = min(losses, key=losses.__getitem__)
            shown = {"none" if a is None else a: round(loss, 5) for a, loss in losses.items()}
            log.info("smoothquant-plus: alpha %s; error of the logits by alpha %s", "none" if alpha is None else alpha, shown)
        else:
            alpha = float(self.alpha)
        folded = _folded(norms, weights, most, alpha)
        return {**folded, **{name: encoding.encode(folded.get(name, weights[name])) for name in linears}}


def _folded(
    norms: list[Smoothed], weights: Weights, most: Mapping[str, torch.Tensor], alpha: float | None
) -> dict[str, torch.Tensor]:
    """The weights that smoothing by ``alpha`` changes; none for None."""
    found: dict[str, torch.Tensor] = {}
    for norm in norms if alpha is not None else ():
        assert alpha is not None
        found |= norm.folded(weights, scales(most[norm.linears[0]], [weights[n] for n in norm.linears], alpha))
    return found


class _Search:
    """How far rounding takes the logits from those of the float weights, for one folding after the other."""

    def __init__(
        self, program: Program, weights: Weights, sequences: list[torch.Tensor], encoding: Int4, linears: Mapping[str, object]
    ) -> None:
        self._program, self._sequences, self._encoding = program, sequences, encoding
        self._weights, self._expected = weights, run_score(program, weights, sequences)[0]
        self._rounded = {name: self._round(weights[name], weights[name]) for name in linears}

    def loss(self, folded: Mapping[str, torch.Tensor]) -> float:
        """``|rounded - float|^2 / |float|^2`` over all logits of all tokens."""
        anew = {n: self._round(w, self._weights[n]) if n in self._rounded else w for n, w in folded.items()}
        found = run_score(self._program, {**self._weights, **self._rounded, **anew}, self._sequences)[0]
        return float((found - self._expected).pow(2).sum() / self._expected.pow(2).sum())

    def _round(self, weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return self._encoding.decode(self._encoding.encode(weight), weight.shape[-1]).to(like.dtype)
