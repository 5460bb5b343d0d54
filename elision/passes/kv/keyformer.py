"""Keyformer: key tokens by a noisy softmax (Adnan et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.ir.states import Gumbel
from elision.passes.base import Pass, register
from elision.passes.kv.heavy import keep_heavy


@register
@dataclass(frozen=True)
class Keyformer(Pass):
    """As `h2o`, but the scores are of a softmax of their own: with Gumbel noise on the logits, and a temperature that rises, so
    that tokens which would have shared the attention of evicted ones are not lost with them.

    The rewrite in one sentence: ``softmax((logits + g) / tau)`` is summed in the place of the probabilities; tau is ``tau`` in
    the prompt and goes to ``tau_end`` in equal steps over the ``steps`` tokens after it. Attention itself is the model's own. The
    noise is a function of ``seed``, the query head and the two positions (`elision.ir.gumbel`; the paper draws anew in every
    layer): equal requests keep equal tokens, whatever is drafted or else in the batch. Published defaults: budgets of 60 % of
    the prompt, 30 % of that recent, tau from 1 to 2 over the new tokens. Without ``noise``, tau 1, it is `h2o`; ``budget``,
    ``recent``, ``sinks``, ``every``, ``per_head``, the identity setting and the memory are those of `h2o`.
    """

    budget: int = 1024
    recent: int = 64
    sinks: int = 4
    every: int = 16
    per_head: bool = True
    noise: bool = True
    tau: float = 1.0
    tau_end: float = 2.0
    steps: int = 256
    seed: int = 0

    name: ClassVar[str] = "keyformer"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        gumbel = Gumbel(self.seed, float(self.noise), float(self.tau), float(self.tau_end), self.steps)
        keep_heavy(program, self.name, self.budget, self.recent, self.sinks, self.every, self.per_head, gumbel=gumbel)
