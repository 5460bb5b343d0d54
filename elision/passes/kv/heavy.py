"""Eviction by accumulated attention, which several methods share."""

from __future__ import annotations

from typing import Any

from elision.ir.program import Program
from elision.ir.states import Budget, Scores
from elision.ir.value import Builder, Value
from elision.passes.kv.caches import Cached, sizes


def keep_heavy(
    program: Program, by: str, budget: int, recent: int, sinks: int, every: int, per_head: bool, **counted: Any
) -> None:
    """Count the attention that entries receive, and keep on the clock the first ``sinks``, the last ``recent`` and the best of
    the others. ``counted``: fields of `Scores`."""
    sizes(by, budget=budget, recent=recent, sinks=sinks, every=every)
    cached = Cached(program, by)
    cached.become(Budget(budget + every, -1), Scores(cached.group, **counted), observe=("prefill", "step"), per_head=per_head)

    def evict(b: Builder, rows: Value, cache: Value, pos: Value) -> Value:
        keep = b.add("keep", b.add("scored", cache, rows), pos, n=budget, recent=recent, sinks=sinks)
        return b.add("select", cache, keep, rows)  # type: ignore[no-any-return]

    cached.on_tick(every, evict)
