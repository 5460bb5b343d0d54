"""Trees whose shape follows what the draft is sure of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.passes.base import register
from elision.passes.speculate.model import ModelPass


@register
@dataclass(frozen=True)
class DySpec(ModelPass):
    """DySpec (Xiong et al. 2024) in its form by levels: a draft's tree of up to ``nodes`` tokens and ``length`` levels, in
    which a node gives children, drawn without replacement, as long as what the draft believes of its path is at least one in
    ``nodes``; greedy rows take the likeliest instead. The draft is the program without ``layers``, or with those before
    ``exit`` only, or another ``model`` (a path).

    ``rule``: how sampled rows are verified, "recursive" (the published one: the distribution is that of plain sampling), or
    "match" (the tokens are). Published: 64 nodes and more, for machines on which they ride free."""

    layers: tuple[int, ...] = ()
    exit: int = 0
    model: str = ""
    nodes: int = 16
    length: int = 6
    rule: str = "match"

    name: ClassVar[str] = "dyspec"

    @classmethod
    def example(cls, program: Program) -> DySpec:
        return cls(exit=max(1, len(program.layers) // 2))
