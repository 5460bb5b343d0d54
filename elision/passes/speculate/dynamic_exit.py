"""Drafts from the model itself up to a layer that is chosen while running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.passes.base import register
from elision.passes.speculate.model import ModelPass, after, without


@register
@dataclass(frozen=True)
class Del(ModelPass):
    """DEL (Zarch et al. 2025, "Context-Aware Dynamic Exit Layer for Efficient Self-Speculative Decoding"): in every round the
    model's layers before one of ``exits`` (text: ``8+12+16``) draft a chain of up to ``length`` tokens; exit and length are
    those with the most tokens per second by what is known of each exit. It stops where its likeliest token has less
    probability than ``stop``. The published controller learns of all exits in every verification; here, where the head of
    each would cost as much as several layers, of the one that drafted, and one drafted round in 16 tries another.

    ``rule``: how sampled rows are verified, "match" (tokens are those of plain sampling), "chain" or "block" (the
    distribution is). Published: length 18, all exits."""

    exits: tuple[int, ...] = ()
    length: int = 8
    stop: float = 0.0
    rule: str = "match"

    name: ClassVar[str] = "del"

    @classmethod
    def example(cls, program: Program) -> Del:
        return cls((max(1, len(program.layers) // 2),))

    def add_drafts(self, program: Program) -> None:
        if not self.exits:
            raise BadInput(f"{self.name}: exits= is empty; expected layers at which drafts may end, such as exits=8+12+16")
        for exit in sorted(set(self.exits)):
            name = f"draft_{exit}"
            program.entries[name] = without(program, after(program, exit, self.name), name, self.name)
