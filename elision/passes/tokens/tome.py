"""ToMe: merge the most similar tokens in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.value import Builder
from elision.passes.base import Pass, register
from elision.passes.tokens.sites import Reduced, Shown, merged, reduce_tokens


@register
@dataclass(frozen=True)
class ToMe(Pass):
    """Token merging in encoders (ToMe, Bolya et al. 2022).

    The rewrite in one sentence: after the attention half of every layer, tokens of even rank join the most similar ones of odd
    rank, by the cosine of their keys, each group becomes its mean weighted by size, later attention adds log(size), and results
    are put back on the tokens that there were. ``n``: tokens that every layer merges away (the paper: 8 to 16 of a ViT's 197); or
    ``share``: that part of the sequence's tokens, for texts of many lengths. ``protect``: first tokens that join no others (the
    class token). ``metric``: the cosine of the keys' mean over heads (``mean``, the paper's) or the mean of the heads' cosines
    (``heads``, which suits text). ``layers``: where (by default in all). Identity setting: n=0 and share=0.
    """

    n: int = 0
    share: float = 0.0
    protect: int = 1
    metric: str = "mean"
    layers: tuple[int, ...] = ()

    name: ClassVar[str] = "tome"
    family: ClassVar[str] = "tokens"
    changes: ClassVar[str] = "tokens"

    @classmethod
    def example(cls, program: Program) -> ToMe:
        return cls(1)

    def apply(self, program: Program) -> None:
        if self.n < 0 or self.protect < 0 or not 0 <= self.share <= 0.5 or (self.n and self.share):
            raise BadInput(f"{self.text()}: expected n >= 0 or a share from 0 to 0.5, one of the two, and protect >= 0")
        if self.metric not in ("mean", "heads"):
            raise BadInput(f"tome: metric={self.metric!r}; expected mean or heads")
        if unknown := sorted(set(self.layers) - set(program.layers)):
            raise BadInput(f"tome: there is no layer {unknown[0]} in {program.name}")
        if self.n or self.share:
            reduce_tokens(program, self.name, self._merge)

    def _merge(self, b: Builder, shown: Shown) -> Reduced | None:
        if self.layers and shown.layer not in self.layers:
            return None
        heads = self.metric == "heads"
        assign = b.add("match", shown.k, n=self.n, share=self.share, protect=self.protect, heads=heads, name="match")
        weight = shown.size if shown.size is not None else b.add("ones", shown.h, dtype=shown.h.tensor.dtype, name="size")
        return merged(b, shown, assign, weight, f"m{shown.layer}")
