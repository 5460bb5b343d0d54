"""GPTQ: integer weights whose rounding errors make each other good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from elision.errors import BadInput
from elision.ir.program import Program, Weights
from elision.ir.retype import store
from elision.ir.value import Value
from elision.ir.weights import Int4, Int8
from elision.passes.base import register
from elision.passes.calibration import Calibrated, Text, run_score
from elision.passes.weights.chosen import chosen
from elision.passes.weights.compensate import compensated, factor, hessian


@register
@dataclass(frozen=True)
class GPTQ(Calibrated):
    """Store float weights of blocks as integers, each input's rounding error made good by the weights of the inputs after it
    (GPTQ, Frantar et al. 2022).

    The rewrite in one sentence: the weights that one `linear` of a block reads become int4 or int8 in groups, rounded in order
    of the inputs by the inverse of H = 2 X X^T over calibration text, and every linear sees inputs that those before it, already
    rounded, have made. Embeddings, heads, experts and shared weights stay: put int4 or int8 after it for these. ``bits``: 4 or 8.
    ``group``: weights along the inputs that share an fp16 scale (and minimum). ``damp``: of the mean diagonal of H, added to it
    (0.01). ``tokens``: about how many to calibrate on, in sequences of 512 (the paper: 128 of 2048).
    """

    bits: int = 4
    group: int = 32
    damp: float = 0.01
    tokens: int = 4096

    name: ClassVar[str] = "gptq"
    family: ClassVar[str] = "weights"
    changes: ClassVar[str] = "encodings"

    @property
    def encoding(self) -> Int4 | Int8:
        if self.bits not in (4, 8):
            raise BadInput(f"gptq: bits={self.bits}; expected 4 or 8")
        return Int4(self.group) if self.bits == 4 else Int8(self.group)

    def apply(self, program: Program) -> None:
        if not 0 < self.damp < float("inf"):
            raise BadInput(f"gptq: damp={self.damp}; expected a share of the mean diagonal above 0, as 0.01")
        encoding = self.encoding
        store(program, dict.fromkeys(chosen(program, encoding, self.text()), encoding))

    def calibrate(self, program: Program, weights: Weights, text: Text) -> dict[str, torch.Tensor]:
        """One run over all sequences: a weight is rounded when its `linear` is reached, and decoded in place, so that all inputs
        after it are those of rounded weights. Needs a float copy of the weights, and the stream of all tokens."""
        encoding = self.encoding
        floats = {name: weights[name].clone() for name in chosen(program, encoding, self.text())}
        names = {id(weight): name for name, weight in floats.items()}
        rounded: dict[str, torch.Tensor] = {}
        last: list[Any] = [None, None]  # the linears of one input follow one another

        def observe(value: Value, operands: Sequence[Any]) -> None:
            name = names.get(id(operands[1])) if value.op == "linear" else None
            if name is None:
                return
            if last[0] is not operands[0]:
                last[:] = operands[0], factor(hessian(operands[0]), self.damp)
            rows = rounded[name] = compensated(floats[name], last[1], encoding)
            floats[name].copy_(encoding.decode(rows, floats[name].shape[1]))

        run_score(program, {**weights, **floats}, text.sequences(program, self.tokens), observe, blocks=True)
        # What score does not read has no inputs to calibrate on.
        return {name: rounded[name] if name in rounded else encoding.encode(floats[name]) for name in floats}
