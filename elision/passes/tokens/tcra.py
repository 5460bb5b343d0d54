"""TCRA: prompts without the words that their meaning does not hang on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from elision.ir.program import Program
from elision.ir.value import Builder, Value, rewrite
from elision.passes.base import Pass, register
from elision.passes.calibration import up_to_last_block
from elision.passes.tokens.edits import edit_prompts, sizes

ENTRY = "embed"  # the model up to its head


@register
@dataclass(frozen=True)
class TCRA(Pass):
    """Words whose absence moves the embedding of their part least are left out of prompts (TCRA-LLM, Liu et al. 2023).

    The rewrite in one sentence: before `prefill` a prompt is edited to the words with the largest impact, the distance between
    the embeddings of a part of the text with the word and without it. The embedding is the mean of the model's own hidden states
    before the head (the paper: of a sentence encoder), so a part of n words takes n + 1 forwards over it. ``keep``: the share of
    the tokens that stays at least (the paper: 0.5 to 0.9); ``segment``: tokens of a part (the paper: a sentence); ``first``,
    ``last``: tokens that stay. Without a tokenizer every token is a word. What was left out is in ``stats.removed``. Identity
    setting: keep=1.
    """

    keep: float = 0.8
    segment: int = 48
    first: int = 16
    last: int = 32

    name: ClassVar[str] = "tcra"
    family: ClassVar[str] = "tokens"
    changes: ClassVar[str] = "tokens"

    def apply(self, program: Program) -> None:
        sizes(self.name, self.keep, self.segment, self.first, self.last)
        if self.keep == 1:
            return
        sized: dict[str, Any] = dict(keep=self.keep, segment=self.segment, first=self.first, last=self.last)

        def stays(b: Builder, ids: Value, words: Value) -> Value:
            return b.add("impact", ids, words, targets=(ENTRY,), axis="kept", **sized)  # type: ignore[no-any-return]

        if "score" in program.entries:
            whole = up_to_last_block(program.entries["score"])
            hidden = replace(whole, name=ENTRY, outputs=whole.outputs[:1])
            program.entries[ENTRY] = rewrite(hidden, lambda b, v, args: None, program.targets)
        edit_prompts(program, self.name, stays)
