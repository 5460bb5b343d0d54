"""Drafts from a tri-gram table that adapts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.passes.base import register
from elision.passes.speculate.table import TablePass


@register
@dataclass(frozen=True)
class Aded(TablePass):
    """ADED (Liu et al. 2024, "Adaptive Draft-Verification for Efficient LLM Decoding"): draft along a table from pairs of tokens
    to their successors that gains weight with what is written, the best ``width`` paths of each of ``depth`` levels. ``slots``:
    pairs that the table holds. Published: depth 4 to 5, 24 paths by Monte Carlo tree search; here a search by level, without
    chance."""

    width: int = 8
    depth: int = 5
    slots: int = 65536

    name: ClassVar[str] = "aded"
