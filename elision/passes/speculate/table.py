"""Passes whose drafts come from tables: they add a drafter to the round."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.drafting.drafter import text_of
from elision.ir.program import Program, answers, drafting, guesses, round_of
from elision.passes.base import Pass
from elision.passes.cache import SCRATCH, with_best
from elision.passes.kv.caches import Cached

LIMITS: dict[str, tuple[int, int]] = {
    "nodes": (1, SCRATCH - 1),
    "length": (1, SCRATCH - 1),
    "branch": (1, SCRATCH - 1),
    "width": (1, SCRATCH - 1),
    "depth": (1, SCRATCH - 1),
    "match": (1, 16),
    "k": (1, 16),
    "memory": (64, 1 << 26),
    "slots": (64, 1 << 26),
}


@dataclass(frozen=True)
class TablePass(Pass):
    """Base of a pass that speculates with the drafter of its own name. Several of them share one tree: equal paths are merged,
    and the length policy keeps the nodes that pay (`elision.ir.drafting`). No setting changes the output: a drafter that finds
    nothing, or whose guesses do not pay, leaves plain decoding."""

    family: ClassVar[str] = "speculate"
    changes: ClassVar[str] = "round"
    quality: ClassVar[str] = "exact"

    def apply(self, program: Program) -> None:
        if program.round is None:
            raise BadInput(f"{self.name}: {program.name} does not generate (it has no round), so there is nothing to draft")
        for field, (least, most) in LIMITS.items():
            value = getattr(self, field, least)
            if not least <= value <= most:
                raise BadInput(f"{self.name}: {field}={value}; expected {least} to {most}")
        _, methods = drafting(program.round)
        if guesses(program):
            raise BadInput(f"{self.name}: drafts come from {methods[0]} already; a model drafts alone: leave one out")
        names = [m.partition(":")[0] for m in methods]
        if self.name in names:
            raise BadInput(f"{self.name} is given twice; give it once, or other drafters beside it")
        step = program.entries["step"]
        k = max(self.wanted, step.outputs[1].tensor.width)
        if k > program.meta["vocab"]:
            raise BadInput(f"{self.name}: k={k}, but the vocabulary has {program.meta['vocab']} tokens")
        for name in answers(program):
            program.entries[name] = with_best(program.entries[name], k, program)
        Cached(program, self.name).deepen(SCRATCH)
        fields = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        program.round = round_of(program, SCRATCH, (*methods, text_of(self.name, fields)))

    @property
    def wanted(self) -> int:
        """How many of the likeliest successors of each node the drafter reads."""
        return 1
