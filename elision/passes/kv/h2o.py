"""H2O: recent tokens and heavy hitters (Zhang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.passes.base import Pass, register
from elision.passes.kv.heavy import keep_heavy


@register
@dataclass(frozen=True)
class H2O(Pass):
    """Keep the tokens that received the most attention so far, and the most recent ones.

    The rewrite in one sentence: the probabilities that an entry receives are summed over all queries, the prompt's too, and
    after the prompt and every ``every`` tokens the cache keeps ``budget`` entries: the first ``sinks``, the last ``recent``, then
    the largest sums (ties: the earlier position). Every key head keeps entries of its own, or, without ``per_head``, the heads
    of a layer the same ones, by the sum over them; what is evicted is lost with its score. Published default: a tenth of the
    prompt recent, a tenth heavy, no sinks. Identity setting: a ``budget`` of at least the context. Memory for a sequence:
    ``budget + every`` entries (the prompt's own length while it comes in), and a float for each entry and head.
    """

    budget: int = 1024
    recent: int = 64
    sinks: int = 4
    every: int = 16
    per_head: bool = True

    name: ClassVar[str] = "h2o"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        keep_heavy(program, self.name, self.budget, self.recent, self.sinks, self.every, self.per_head)
