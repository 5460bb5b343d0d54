"""DuoAttention: a whole cache for retrieval heads only (Xiao et al. 2024)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.mask import Mask
from elision.ir.program import Program, Weights
from elision.ir.states import KV, Budget
from elision.ir.value import Builder, Value
from elision.passes.base import Pass, register
from elision.passes.calibration import Choosing, Text
from elision.passes.kv.caches import Cached, sizes
from elision.passes.kv.reading import readable
from elision.passes.kv.retrieval import retrieval_errors
from elision.passes.kv.split_heads import Split, other
from elision.passes.kv.streaming_llm import CHUNK

log = logging.getLogger("elision")


@register
@dataclass(frozen=True)
class DuoAttention(Choosing):
    """Retrieval heads keep the whole cache, all other key heads the first ``sinks`` and the last ``window`` entries.

    The rewrite in one sentence: the cache of a layer becomes two, one for its retrieval heads as it was, and one for its
    streaming heads, which attend by the mask ``window(window, sinks)`` and drop every ``every`` tokens, and between the parts of
    a prompt, what no later token sees. ``heads``: the retrieval heads, numbered layer x key heads + head; without it
    ``sparsity``, a share of all heads rounded down, are streaming: those whose output changes least when they stream, on text
    with spans that come again at its end (`elision.passes.kv.retrieval`, about ``tokens`` tokens). The paper trains a gate for
    every head on such text, which this measure takes the place of. Published defaults: 64 sinks, windows of 256, half of the
    heads streaming with grouped queries and three quarters without. Identity setting: sparsity=0, or ``sinks + window`` of at
    least the context. Memory for a sequence: of a streaming head ``sinks + window + every`` entries, and 512 more while the
    prompt comes in. Layers with a window of their own stay as they are.
    """

    sparsity: float = 0.5
    heads: tuple[int, ...] = ()
    sinks: int = 64
    window: int = 256
    every: int = 16
    tokens: int = 4096

    name: ClassVar[str] = "duo-attention"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    @classmethod
    def example(cls, program: Program) -> DuoAttention:
        return cls(1.0)

    def choose(self, program: Program, weights: Weights, text: Text) -> Pass:
        known = self._numbers(program)
        count = len(known) - int(self.sparsity * len(known) + 1e-9)
        if self.heads or count in (0, len(known)):
            return self
        errors = retrieval_errors(program, weights, text, self.tokens, self.sinks, self.window)
        found = sorted(known, key=lambda i: (-errors.get(known[i], 0.0), i))[:count]
        log.info("duo-attention: retrieval heads %s", ", ".join(f"{i}: {errors.get(known[i], 0.0):.2e}" for i in found))
        return replace(self, heads=tuple(sorted(found)))

    def apply(self, program: Program) -> None:
        known = self._numbers(program)
        if not self.heads and 0 < int(self.sparsity * len(known) + 1e-9) < len(known):
            said = f"{self.text()}{',' if ':' in self.text() else ':'}heads=3+7"
            raise BadInput(f"{self.name} chooses heads on text, in elision.compile; or say which retrieve: {said}")
        if unknown := sorted(set(self.heads) - set(known)):
            raise BadInput(f"{self.name}: there is no head {unknown[0]}; expected some of {min(known)} to {max(known)}")
        everything = not self.heads and int(self.sparsity * len(known) + 1e-9) == 0
        full: dict[str, tuple[int, ...]] = {name: () for name, _ in known.values()}
        for number, (name, head) in sorted(known.items()):
            if everything or number in self.heads:
                full[name] += (head,)
        cached = Cached(program, self.name)
        states = cached.states
        none = {name for name, heads in full.items() if not heads}
        some = {name: heads for name, heads in full.items() if heads and len(heads) < states[name].heads}
        mask = Mask("window", self.window, self.sinks)
        if none:
            cached.retype(self._few, only=none, mask=mask)
        if some:
            Split(program, some, self._few, mask).apply()
        if streaming := none | {other(name) for name in some}:
            cached.on_tick(self.every, self._evict, chunks=True, only=streaming)

    def _numbers(self, program: Program) -> dict[int, tuple[str, int]]:
        """By number of a head, its cache and its place in it."""
        sizes(self.name, window=self.window, sinks=self.sinks, every=self.every)
        if not 0 <= self.sparsity <= 1:
            raise BadInput(f"{self.name}: sparsity={self.sparsity}; expected a share of the heads, 0 to 1")
        layers = readable(program, self.name, extras=())
        states = Cached(program, self.name).states
        found = {(layer * states[name].heads + h): (name, h) for name, layer in layers.items() for h in range(states[name].heads)}
        if len(found) != sum(states[name].heads for name in layers):
            raise BadInput(f"{self.name}: layers of {program.name} have different numbers of key heads")
        return found

    def _few(self, type: KV) -> KV:
        slots = Budget(self.sinks + self.window + self.every, CHUNK)
        return replace(type.with_segment(0, replace(type.main[0], slots=slots)), keyed_by="explicit")

    def _evict(self, b: Builder, rows: Value, cache: Value, pos: Value) -> Value:
        keep = b.add("keep", pos, pos, n=self.sinks + self.window, recent=self.window, sinks=self.sinks)
        return b.add("select", cache, keep, rows)  # type: ignore[no-any-return]
