"""EViT: keep the tokens that the class token attends to, and fuse the others into one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.value import Builder
from elision.passes.base import Pass, register
from elision.passes.tokens.sites import Reduced, Shown, merged, reduce_tokens


@register
@dataclass(frozen=True)
class EViT(Pass):
    """Attentive tokens stay, the others become one (EViT, Liang et al. 2022).

    The rewrite in one sentence: after the attention half of some layers, the tokens that get most of the first token's attention
    stay, the mean of the others by that attention takes the place of the best of them, and results are put back on the tokens
    that there were. (The paper's sum is not divided by the total; the mean keeps the stream's scale.) ``keep``: the share of the
    tokens after the first that stays, rounded up (the paper: 0.7). ``layers``: where (the paper: 3, 6 and 9 of 12; by default
    those at a quarter, a half and three quarters of the stream). Identity setting: keep=1.
    """

    keep: float = 0.7
    layers: tuple[int, ...] = ()

    name: ClassVar[str] = "evit"
    family: ClassVar[str] = "tokens"
    changes: ClassVar[str] = "tokens"

    def apply(self, program: Program) -> None:
        if not 0 < self.keep <= 1:
            raise BadInput(f"evit: keep={self.keep}; expected a share above 0, at most 1")
        there = list(program.layers)
        where = self.layers or tuple(sorted({there[len(there) * i // 4] for i in (1, 2, 3)})) if there else ()
        if unknown := sorted(set(where) - set(there)):
            raise BadInput(f"evit: there is no layer {unknown[0]} in {program.name}")
        if self.keep < 1:
            reduce_tokens(program, self.name, lambda b, shown: self._fuse(b, shown) if shown.layer in where else None)

    def _fuse(self, b: Builder, shown: Shown) -> Reduced:
        score = b.add("regard", shown.q, shown.k, scale=shown.scale, name="score")
        found = merged(b, shown, b.add("fuse", score, keep=self.keep, name="fuse"), score, f"f{shown.layer}")
        return replace(found, size=None)  # the fused token is an ordinary one later
