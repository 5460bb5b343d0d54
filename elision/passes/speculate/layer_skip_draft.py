"""Drafts from the model itself with layers left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.passes.base import register
from elision.passes.speculate.model import ModelPass


@register
@dataclass(frozen=True)
class LayerSkipDraft(ModelPass):
    """Draft & Verify (Zhang et al. 2023) and LayerSkip (Elhoushi et al. 2024): the model without ``layers`` (text:
    ``3+7-9``), or with those before ``exit`` only, drafts a chain of up to ``length`` tokens on the model's own weights and
    caches, and stops where its likeliest token has less probability than ``stop``. Verification runs all layers and
    overwrites what the draft wrote.

    ``rule``: how sampled rows are verified, "match" (tokens are those of plain sampling), "chain" or "block" (the
    distribution is). Published: about half of the layers skipped, length 12, stop adapted; here the length policy stops
    (`elision.ir.drafting.policy`), and nothing is drafted where it does not pay."""

    layers: tuple[int, ...] = ()
    exit: int = 0
    length: int = 8
    stop: float = 0.0
    rule: str = "match"

    name: ClassVar[str] = "layer-skip-draft"

    @classmethod
    def example(cls, program: Program) -> LayerSkipDraft:
        return cls(exit=max(1, len(program.layers) // 2))
