"""LLMLingua: prompts without the tokens that the model foresees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.value import Builder, Value
from elision.passes.base import Pass, register
from elision.passes.tokens.edits import edit_prompts, sizes


@register
@dataclass(frozen=True)
class LLMLingua(Pass):
    """Prompt tokens that do not surprise are left out before the prompt is read (LLMLingua, Jiang et al. 2023).

    The rewrite in one sentence: before `prefill` a prompt is edited, part by part, to the tokens with the largest loss after what
    is left before them. The model itself gives the losses, by its own forward (the paper: a smaller one), one run for each part
    and, with ``spread``, one for the budget. ``keep``: the share of the prompt that stays (the paper: 1/2 to 1/20); ``segment``:
    tokens of a part (the paper: 200); ``first``, ``last``: tokens of the instruction and of the question, which stay (the paper:
    85 % and 90 % of them); ``spread``: by how much the shares of parts differ, more for surprising ones. What was left out is in
    ``stats.removed``. Identity setting: keep=1.
    """

    keep: float = 0.5
    segment: int = 200
    first: int = 16
    last: int = 32
    spread: float = 0.1

    name: ClassVar[str] = "llmlingua"
    family: ClassVar[str] = "tokens"
    changes: ClassVar[str] = "tokens"

    def apply(self, program: Program) -> None:
        sizes(self.name, self.keep, self.segment, self.first, self.last)
        if not 0 <= self.spread <= 1:
            raise BadInput(f"llmlingua: spread={self.spread}; expected 0 to 1")
        sized: dict[str, Any] = dict(keep=self.keep, segment=self.segment, first=self.first, last=self.last, spread=self.spread)

        def stays(b: Builder, ids: Value, words: Value) -> Value:
            return b.add("compress", ids, targets=("score",), axis="kept", **sized)  # type: ignore[no-any-return]

        if self.keep < 1:
            edit_prompts(program, self.name, stays)
