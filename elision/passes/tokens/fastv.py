"""FastV: after a few layers, leave out what the end of the prompt does not look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.passes.base import Pass, register
from elision.passes.tokens.prompts import Choice, prune_prompts


@register
@dataclass(frozen=True)
class FastV(Pass):
    """Prompt tokens that the last one does not attend to stop after a few layers (FastV, Chen et al. 2024).

    The rewrite in one sentence: before layer ``layer`` of the prompt only the tokens stay that get most of the attention of its
    last tokens in the layer before, at their positions, so that later layers compute less and their caches hold less. ``keep``:
    the share of the prompt that stays, rounded up. ``last``: the tokens at the end that look, and stay; ``first``: those at the
    beginning that stay, which every token leans on. The paper leaves out image tokens alone, half of them from layer 2 on; a
    prompt of text is treated as one span. A prompt is read in one piece: its end says what stays. Caches of later layers hold
    fewer entries, but have room for the whole prompt: time is saved, memory is not. Published setting: layer=2, keep=0.5.
    Identity setting: keep=1.
    """

    layer: int = 2
    keep: float = 0.5
    last: int = 1
    first: int = 1

    name: ClassVar[str] = "fastv"
    family: ClassVar[str] = "tokens"
    changes: ClassVar[str] = "tokens"

    @classmethod
    def example(cls, program: Program) -> FastV:
        return cls(max(list(program.layers)[:2], default=1))

    def apply(self, program: Program) -> None:
        if not 0 < self.keep <= 1:
            raise BadInput(f"fastv: keep={self.keep}; expected a share of the prompt above 0, at most 1")
        prune_prompts(program, self.name, {self.layer: self.keep}, Choice(self.last, self.first))
