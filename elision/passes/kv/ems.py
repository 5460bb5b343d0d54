"""EMS: evict, then merge (Li et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.states import Budget, Scores
from elision.ir.value import Builder, Value
from elision.passes.base import Pass, register
from elision.passes.kv.caches import Cached, sizes


@register
@dataclass(frozen=True)
class EMS(Pass):
    """Keep what matters overall and lately, and merge what comes next into it.

    The rewrite in one sentence: after the prompt and every ``every`` tokens each key head keeps the last ``window`` entries and
    the ``budget - window`` with the largest scores; of the others the ``rho (budget - window)`` best join the kept entry with the
    most similar key, if the cosine is at least ``theta``, and the rest are lost. An entry's score is ``share`` of the attention
    that it received from each token that could see it, and the rest of what it received lately (`blend`). Means are weighed by
    scores (`elision.ir.absorb`). There is no public code: the constants are reconstructed from the paper's description. Here
    "lately" fades by ``1 - 1 / window`` with every token, keys are compared rotated, hence only up to ``near`` positions apart,
    and all heads have one ``rho`` and ``theta``. Published budgets: 256 to 1024. ``rho=0`` or ``theta`` above 1 merges nothing;
    identity setting: a ``budget`` of at least the context. Memory for a sequence: ``budget + every`` entries (the prompt's own
    length while it comes in), and two floats for each entry and head. The merge runs on the host.
    """

    budget: int = 1024
    window: int = 32
    share: float = 0.5
    rho: float = 1.0
    theta: float = 0.6
    near: int = 64
    every: int = 16

    name: ClassVar[str] = "ems"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        sizes(self.name, budget=self.budget, recent=self.window, window=self.window, every=self.every, near=self.near)
        if not 0 <= self.share <= 1 or self.rho < 0 or self.window < 2:
            raise BadInput(f"{self.text()}: expected share 0 to 1, rho of at least 0 and a window of at least 2")
        cached = Cached(program, self.name)
        scores = Scores(cached.group, local=1 - 1 / self.window)
        cached.become(Budget(self.budget + self.every, -1), scores, observe=("prefill", "step"), per_head=True)

        def evict(b: Builder, rows: Value, cache: Value, pos: Value) -> Value:
            overall, lately = b.add("scored", cache, rows), b.add("scored", cache, rows, which="local")
            score = b.add("blend", overall, lately, pos, share=float(self.share))
            keep = b.add("keep", score, pos, n=self.budget, recent=self.window)
            n = int(self.rho * (self.budget - self.window))
            merged = b.add("absorb", cache, score, pos, keep, rows, n=n, least=float(self.theta), near=self.near)
            return b.add("select", merged, keep, rows)  # type: ignore[no-any-return]

        cached.on_tick(self.every, evict)
