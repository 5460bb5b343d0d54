"""Unified layer skipping: evenly spaced layers, for a target speed-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.passes.base import Pass, register
from elision.passes.layers.skip_layers import SkipLayers


@register
@dataclass(frozen=True)
class UnifiedSkip(Pass):
    """Static layer skipping by the speed-up alone (Unified Layer Skipping, Liu et al. 2024).

    The rewrite in one sentence: of L layers, K = round(L / speedup) evenly spaced ones stay, the first and the last among them,
    and the others are left out as by skip-layers. ``speedup``: how many times fewer layers (the paper: 1.5, 2, 3). Identity
    setting: speedup=1.
    """

    speedup: float = 1.0

    name: ClassVar[str] = "unified-skip"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "blocks"

    @classmethod
    def example(cls, program: Program) -> UnifiedSkip:
        return cls(2.0)

    def apply(self, program: Program) -> None:
        if not 1 <= self.speedup < float("inf"):
            raise BadInput(f"unified-skip: speedup={self.speedup}; expected at least 1")
        there = list(program.layers)
        kept = {there[i] for i in evenly(len(there), self.speedup)}
        SkipLayers(tuple(i for i in there if i not in kept)).apply(program)


def evenly(layers: int, speedup: float) -> list[int]:
    """The round(layers / speedup) numbers that stay, the first and the last of all among them (one: the last)."""
    count = max(1, round(layers / speedup))
    if count >= layers:
        return list(range(layers))
    return [layers - 1] if count == 1 else [round(i * (layers - 1) / (count - 1)) for i in range(count)]
