"""Unified layer skipping: evenly spaced layers, for a target speed-up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from elision.ir.cost import StepCost
from elision.ir.program import Program
from elision.passes.base import Pass, register
from elision.passes.layers.depth import evenly, gains, step_bytes, step_seconds
from elision.passes.layers.skip_layers import leave_out
from elision.passes.timing import Clock, Timed

CONTEXT = 256  # tokens before the step that is timed


@register
@dataclass(frozen=True)
class UnifiedSkip(Timed):
    """Static layer skipping by the speed-up alone (Unified Layer Skipping, Liu et al. 2024).

    The rewrite in one sentence: of the layers, K evenly spaced ones stay, the first and the last among them, and the others are
    left out as by skip-layers. ``speedup``: how many times faster a decode step is, head and host included, which K follows from
    by the times of two steps, with all layers and with half of them (the paper: 1.5, 2, 3, of the layers alone: K = L / speedup).
    ``keep``: K, as it was chosen; given, nothing is timed. Identity setting: speedup=1.
    """

    speedup: float = 1.0
    keep: int = 0

    name: ClassVar[str] = "unified-skip"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "blocks"
    version: ClassVar[int] = 3

    @classmethod
    def example(cls, program: Program) -> UnifiedSkip:
        return cls(1.1)

    def timed(self, program: Program, clock: Clock) -> Pass:
        if self.keep or self.speedup == 1 or len(program.layers) < 2:
            return self
        context = min(CONTEXT, int(program.meta["positions"]) // 2)
        return replace(self, keep=self._nearest(program, step_seconds(program, clock, (context,))))

    def apply(self, program: Program) -> None:
        there = list(program.layers)
        kept = {there[i] for i in evenly(len(there), self.keep or self._nearest(program, step_bytes(program)))}
        leave_out(program, [i for i in there if i not in kept], "", self.name)

    def _nearest(self, program: Program, step: StepCost) -> int:
        """How many layers come nearest to the speed-up."""
        gains(program, self.speedup, self.name, step)
        count = len(program.layers)
        return min(range(1, count + 1), key=lambda kept: abs(step(count) / step(kept) / self.speedup - 1), default=0)
