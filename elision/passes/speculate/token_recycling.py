"""Drafts from each token's latest likely successors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.passes.base import register
from elision.passes.speculate.table import TablePass


@register
@dataclass(frozen=True)
class TokenRecycling(TablePass):
    """Token Recycling (Luo et al. 2024): keep the ``k`` likeliest successors that each token had when it was last run, and draft
    the tree of them along a template of ``nodes`` rank paths in ``depth`` levels. Published: k 8, 80 nodes, depth 6, for machines
    on which they ride free; the length policy takes as many of them as pay here."""

    nodes: int = 40
    k: int = 8
    depth: int = 6

    name: ClassVar[str] = "token-recycling"

    @property
    def wanted(self) -> int:
        return self.k
