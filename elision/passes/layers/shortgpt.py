"""ShortGPT: leave out the layers that change the stream least."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from elision.errors import BadInput
from elision.ir.program import Program, Weights
from elision.passes.base import Pass, register
from elision.passes.calibration import Choosing, Text
from elision.passes.layers.parts import layer_streams
from elision.passes.layers.skip_layers import leave_out

log = logging.getLogger("elision")


@register
@dataclass(frozen=True)
class ShortGPT(Choosing):
    """Static layer skipping by block influence (ShortGPT, Men et al. 2024).

    The rewrite in one sentence: the layers with the smallest BI = 1 - mean over tokens of cos(h_l, h_{l+1}), the stream before
    and after layer l on calibration text, are left out as by skip-layers. ``share``: of the layers, rounded down (the paper:
    0.25 to 0.3). ``tokens``: about how many to calibrate on, in sequences of 512. ``layers``: what was chosen; given, nothing is
    calibrated. Identity setting: share=0.
    """

    share: float = 0.0
    layers: tuple[int, ...] = ()
    tokens: int = 4096

    name: ClassVar[str] = "shortgpt"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "blocks"

    @classmethod
    def example(cls, program: Program) -> ShortGPT:
        return cls(0.25, (next(iter(program.layers), 0),))

    def choose(self, program: Program, weights: Weights, text: Text) -> Pass:
        count = left_out(self, self.share, program)
        if self.layers or not count:
            return self
        influence = block_influence(program, weights, text.sequences(program, self.tokens))
        log.info("shortgpt: block influence %s", ", ".join(f"{i}: {bi:.3f}" for i, bi in influence.items()))
        found = sorted(influence, key=lambda i: (influence[i], i))[:count]
        return replace(self, layers=tuple(sorted(found)))

    def apply(self, program: Program) -> None:
        if left_out(self, self.share, program) and not self.layers:
            raise BadInput(f"shortgpt chooses on text, in elision.compile; or say what it chose: {self.text()},layers=3+7")
        leave_out(program, self.layers, "", self.name)


def left_out(step: Pass, share: float, program: Program) -> int:
    """How many layers a share is, rounded down. Raises BadInput unless it leaves one."""
    if not 0 <= share < 1:
        raise BadInput(f"{step.name}: share={share}; expected a part of the layers, at least 0 and less than 1")
    return int(share * len(program.layers) + 1e-9)


def block_influence(program: Program, weights: Weights, sequences: list[torch.Tensor]) -> dict[int, float]:
    """By layer, 1 - the mean over tokens of the cosine of the stream before it and after it."""
    if not program.layers:
        raise BadInput(f"shortgpt: {program.name} has no layers that were found as blocks of a stream")
    h = layer_streams(program, weights, sequences).double()
    cosine = torch.nn.functional.cosine_similarity(h[:-1], h[1:], dim=-1).mean(-1)
    return {i: 1 - float(c) for i, c in zip(program.layers, cosine, strict=True)}
