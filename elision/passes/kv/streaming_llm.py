"""StreamingLLM: a few first tokens and a sliding window (Xiao et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.states import Budget
from elision.ir.value import Builder, Value
from elision.passes.base import Pass, register
from elision.passes.kv.caches import Cached, sizes

CHUNK = 512  # tokens of a prompt that come in at once


@register
@dataclass(frozen=True)
class StreamingLLM(Pass):
    """Every token sees the first ``sinks`` tokens and the last ``window``, itself included; nothing else is kept.

    The rewrite in one sentence: attention gets the mask ``window(window, sinks)``, and every ``every`` tokens, and between the
    parts of a prompt, the cache drops what no later token sees. Dropping changes no result, so neither does ``every``.
    Published defaults: 4 sinks, windows of 512 to 2044. Identity setting: ``sinks + window`` of at least the context. Positions
    stay those of the text: the paper counts within the cache instead, which matters only beyond the trained context.
    Memory for a sequence: ``sinks + window + every`` entries, and 512 more while the prompt comes in.
    """

    window: int = 1020
    sinks: int = 4
    every: int = 16

    name: ClassVar[str] = "streaming-llm"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        sizes(self.name, window=self.window, sinks=self.sinks, every=self.every)
        cached, kept = Cached(program, self.name), self.sinks + self.window
        cached.become(Budget(kept + self.every, CHUNK), mask=Mask("window", self.window, self.sinks))

        def evict(b: Builder, rows: Value, cache: Value, pos: Value) -> Value:
            keep = b.add("keep", pos, pos, n=kept, recent=self.window, sinks=self.sinks)
            return b.add("select", cache, keep, rows)  # type: ignore[no-any-return]

        cached.on_tick(self.every, evict, chunks=True)
