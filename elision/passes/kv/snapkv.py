"""SnapKV: the prompt compressed once, by what its last queries look at (Li et al. 2024)."""

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
class SnapKV(Pass):
    """After the prompt keep ``budget`` of its tokens: the last ``window``, and those that they look at, with their neighbours.

    The rewrite in one sentence: the probabilities that an entry receives from the last ``window`` queries of the prompt are
    summed and averaged over ``pool`` neighbouring positions, and the cache keeps the window and the largest of them. Tokens
    after the prompt are all kept. Every key head keeps entries of its own, or, without ``per_head``, the heads of a layer the
    same ones, by the sum over them. Published defaults: windows of 32 or 64, pools of 5 or 7, budgets of 1024 to 4096. Identity
    setting: a ``budget`` of at least the prompt. Memory for a sequence: ``budget`` entries and one for every new token (the
    prompt's own length while it comes in; of a batch, as many as its shortest prompt allows to give back).
    """

    budget: int = 1024
    window: int = 32
    pool: int = 5
    per_head: bool = True

    name: ClassVar[str] = "snapkv"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        sizes(self.name, budget=self.budget, recent=self.window, window=self.window)
        if self.pool < 1 or self.pool % 2 == 0:
            raise BadInput(f"{self.name}: pool={self.pool}; expected an odd number of positions")
        cached = Cached(program, self.name)
        slots = Budget(self.budget, -1, open=True)
        cached.become(slots, Scores(cached.group, depth=0), observe=("prefill",), last=self.window, per_head=self.per_head)

        def evict(b: Builder, rows: Value, cache: Value, pos: Value) -> Value:
            score = b.add("pool", b.add("scored", cache, rows), pos, size=self.pool, recent=self.window)
            keep = b.add("keep", score, pos, n=self.budget, recent=self.window)
            return b.add("select", cache, keep, rows)  # type: ignore[no-any-return]

        cached.on_tick(0, evict)
