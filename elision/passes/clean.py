"""Dead code and common sub-expressions: rebuild every graph from what its outputs need, equal values once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from elision.ir.program import Program
from elision.ir.value import rewrite
from elision.passes.base import Pass, register


@register
@dataclass(frozen=True)
class Clean(Pass):
    """Remove values that no output needs and merge equal ones (hash-consing does it on rebuilding), then drop unused
    templates, states and parameters. Runs at the end of every pipeline; it never changes a result."""

    name: ClassVar[str] = "clean"
    family: ClassVar[str] = "core"
    changes: ClassVar[str] = "clean"
    quality: ClassVar[str] = "exact"

    def apply(self, program: Program) -> None:
        for table in (program.templates, program.entries):
            for name, graph in table.items():
                table[name] = rewrite(graph, lambda b, v, a: None, program.targets)
        program.ticks = tuple(replace(t, graph=rewrite(t.graph, lambda b, v, a: None)) for t in program.ticks)
        program.drop_unused()
