"""Drafts from a smaller model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.passes.base import register
from elision.passes.speculate.model import ModelPass


@register
@dataclass(frozen=True)
class SpecSampling(ModelPass):
    """Speculative sampling (Leviathan et al. 2023; Chen et al. 2023): another compiled model, ``model`` (a path), of the same
    tokenizer drafts a chain of up to ``length`` tokens, and stops where its likeliest token has less probability than
    ``stop``. It becomes part of the program, with its weights and caches.

    ``rule``: how sampled rows are verified, "match" (tokens are those of plain sampling), "chain" or "block" (the
    distribution is). Published: length 4 to 7, rule chain; here the length policy decides in every round, and the draft runs
    only where it pays."""

    model: str = ""
    length: int = 4
    stop: float = 0.0
    rule: str = "match"

    name: ClassVar[str] = "spec-sampling"

    @classmethod
    def example(cls, program: Program) -> SpecSampling:
        return cls(model="draft.elision")
