"""What every rule looks at: the program, the ops that its runs reach, and what the kernels can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from elision.errors import IllegalProgram
from elision.ir.op import lookup
from elision.ir.program import Program
from elision.ir.types import Axis, Tensor
from elision.ir.value import Graph
from elision.ir.walk import Site, ran, sites

#: What the reference kernels can do, by op: results of `attend` besides the output, and caches kept per head.
REFERENCE: Mapping[str, frozenset[str]] = {"attend": frozenset({"lse", "mass", "per_head"})}


@dataclass(frozen=True)
class View:
    """A program as the rules see it. ``kernels``: by op, the features that the target's kernel has (see `REFERENCE`)."""

    program: Program
    kernels: Mapping[str, frozenset[str]]

    @property
    def runs(self) -> dict[str, Graph]:
        """The graphs that the runtime runs: entries, the round, the ticks."""
        return {n: g for n, g in self.program.graphs().items() if n not in self.program.templates}

    @cached_property
    def sites(self) -> dict[str, list[Site]]:
        """Every op that each of these runs reaches."""
        return {name: list(sites(self.program, graph)) for name, graph in self.runs.items()}

    def once(self, *ops: str) -> Iterator[Site]:
        """The sites of these ops over all runs; what the round runs of an entry is given for the entry only."""
        for found in self.sites.values():
            for site in found:
                if site.value.op in ops and not set(ran(site.top)) & set(self.program.entries):
                    yield site

    @cached_property
    def makers(self) -> dict[tuple[str, Axis], str]:
        """Which op made each token axis, by run."""
        found: dict[tuple[str, Axis], str] = {}
        for name, reached in self.sites.items():
            for site in reached:
                made = site.actual(site.value)
                made = made[0] if isinstance(made, tuple) else made
                if lookup(site.value.op).makes_axis and isinstance(made, Tensor) and made.tokens is not None:
                    found[name, made.tokens] = site.value.op
        return found

    def chosen(self, site: Site, axis: Axis | None) -> bool:
        """True for an axis that leaves tokens of the call out, other than all but each row's first or last."""
        return axis is not None and axis.parent is not None and self.makers.get((site.root.name, axis)) not in ("first", "last")


Rule = Callable[[View], Iterator[IllegalProgram]]
