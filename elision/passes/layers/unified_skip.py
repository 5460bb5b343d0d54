"""Unified layer skipping: evenly spaced layers, for a target speed-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.passes.base import Pass, register
from elision.passes.layers.depth import kept_for
from elision.passes.layers.skip_layers import SkipLayers


@register
@dataclass(frozen=True)
class UnifiedSkip(Pass):
    """Static layer skipping by the speed-up alone (Unified Layer Skipping, Liu et al. 2024).

    The rewrite in one sentence: of the layers, K evenly spaced ones stay, the first and the last among them, and the others are
    left out as by skip-layers. ``speedup``: how many times fewer bytes of weights a decode step reads, which K follows from (the
    paper: 1.5, 2, 3, of the layers alone: K = L / speedup, the same where the head is small). Identity setting: speedup=1.
    """

    speedup: float = 1.0

    name: ClassVar[str] = "unified-skip"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "blocks"
    version: ClassVar[int] = 2

    @classmethod
    def example(cls, program: Program) -> UnifiedSkip:
        return cls(1.1)

    def apply(self, program: Program) -> None:
        there = list(program.layers)
        kept = {there[i] for i in evenly(len(there), round(kept_for(program, self.speedup, self.name)))}
        SkipLayers(tuple(i for i in there if i not in kept)).apply(program)


def evenly(layers: int, count: int) -> list[int]:
    """The ``count`` numbers (at least one) that stay, the first and the last of all among them (one: the last)."""
    if count >= layers:
        return list(range(layers))
    return [layers - 1] if count <= 1 else [round(i * (layers - 1) / (count - 1)) for i in range(count)]
