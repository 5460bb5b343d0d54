"""Zero-TPrune: leave out tokens of an encoder by a page rank over its attention, and those that others resemble."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.value import Builder
from elision.passes.base import Pass, register
from elision.passes.tokens.sites import Reduced, Shown, reduce_tokens


@register
@dataclass(frozen=True)
class ZeroTPrune(Pass):
    """Tokens that the attention graph ranks low, and those that resemble better ones, go (Zero-TPrune, Wang et al. 2023).

    The rewrite in one sentence: after the attention half of some layers, tokens with the smallest weighted page rank over that
    layer's attention are left out, then of the less important half those most similar to one of the other half, without training;
    a token that is gone gets, at the end, the result of the most similar one that stayed. ``keep``: the share of the tokens after
    the first that stays at each of the layers, rounded up; ``similar``: how much of the rest goes for similarity (the paper
    searches both). ``layers``: where (the paper: 1, 3, 6, 9, 11 of 12; by default about these). ``rounds``: of the page rank (the
    paper: 30 to 50 in the first third of the layers, 5 to 10 in the second, then 1); 0 means 30, 5 and 1, and what has settled
    stops before. ``protect``: so many first tokens always stay. Identity setting: keep=1.
    """

    keep: float = 0.8
    similar: float = 0.5
    layers: tuple[int, ...] = ()
    rounds: int = 0
    protect: int = 1

    name: ClassVar[str] = "zero-tprune"
    family: ClassVar[str] = "tokens"
    changes: ClassVar[str] = "tokens"

    def apply(self, program: Program) -> None:
        if not 0 < self.keep <= 1 or not 0 <= self.similar <= 1 or self.rounds < 0 or self.protect < 0:
            raise BadInput(f"{self.text()}: expected 0 < keep <= 1, 0 <= similar <= 1, rounds >= 0 and protect >= 0")
        there = list(program.layers)
        where = self.layers or tuple(sorted({there[len(there) * i // 12] for i in (1, 3, 6, 9, 11)})) if there else ()
        if unknown := sorted(set(where) - set(there)):
            raise BadInput(f"zero-tprune: there is no layer {unknown[0]} in {program.name}")

        def reduce(b: Builder, shown: Shown) -> Reduced | None:
            if shown.layer not in where:
                return None
            depth = 3 * there.index(shown.layer) // len(there)
            rounds = self.rounds or (30, 5, 1)[depth]
            score = b.add("pagerank", shown.q, shown.k, scale=shown.scale, rounds=rounds, name="score")
            assign = b.add("prune", score, shown.k, keep=self.keep, similar=self.similar, protect=self.protect, name="prune")
            kept = b.add("clusters", assign, axis=f"p{shown.layer}", name="kept")
            return Reduced(b.add("restrict", shown.h, kept, name="h"), None, b.add("joined", assign, kept, name="joined"))

        if self.keep < 1:
            reduce_tokens(program, self.name, reduce)
