"""Several independent drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.passes.base import register
from elision.passes.speculate.model import ModelPass


@register
@dataclass(frozen=True)
class SpecTr(ModelPass):
    """SpecTr (Sun et al. 2023): a draft draws ``chains`` independent paths of up to ``length`` tokens, verified as one tree.
    The draft is the program without ``layers``, or with those before ``exit`` only, or another ``model`` (a path). Greedy
    rows have one path.

    ``rule``: how sampled rows are verified, "k-seq" (the published one) or "recursive" (the distribution is that of plain
    sampling), or "match" (the tokens are). Published: 2 to 8 chains of 4 to 8 tokens."""

    layers: tuple[int, ...] = ()
    exit: int = 0
    model: str = ""
    chains: int = 3
    length: int = 4
    rule: str = "k-seq"

    name: ClassVar[str] = "spectr"

    @classmethod
    def example(cls, program: Program) -> SpecTr:
        return cls(exit=max(1, len(program.layers) // 2))
