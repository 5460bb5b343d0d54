"""A2SF: H2O with a forgetting factor (Jo and Shin 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.passes.base import Pass, register
from elision.passes.kv.heavy import keep_heavy


@register
@dataclass(frozen=True)
class A2SF(Pass):
    """As `h2o`, but with every further token the sums so far are multiplied by ``alpha``, so that old tokens, which more queries
    have seen, have no advantage over new ones.

    ``alpha`` in (0, 1]: 1 is `h2o`; towards 0 only the latest query counts. The authors' code uses 0.95 with 16 recent of 256
    tokens. ``budget``, ``recent``, ``sinks``, ``every``, ``per_head``, the identity setting and the memory are those of `h2o`.
    """

    budget: int = 1024
    recent: int = 64
    sinks: int = 4
    every: int = 16
    per_head: bool = True
    alpha: float = 0.95

    name: ClassVar[str] = "a2sf"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        if not 0 < self.alpha <= 1:
            raise BadInput(f"{self.name}: alpha={self.alpha}; expected a factor above 0 and at most 1")
        keep_heavy(program, self.name, self.budget, self.recent, self.sinks, self.every, self.per_head, decay=float(self.alpha))
