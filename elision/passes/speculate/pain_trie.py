"""Drafts from everything that followed the last tokens before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.passes.base import register
from elision.passes.speculate.table import TablePass


@register
@dataclass(frozen=True)
class PainTrie(TablePass):
    """Trie retrieval (Zhao et al. 2023, "Lookahead: An Inference Acceleration Framework"): draft the tree of all continuations of
    the last ``match`` tokens, ``branch`` tokens deep, in the prompt and in earlier outputs (the last ``memory`` tokens of them),
    the most frequent first, at most ``nodes``. Published: match 2, branch 12, 64 nodes."""

    match: int = 2
    branch: int = 12
    nodes: int = 63
    memory: int = 65536

    name: ClassVar[str] = "pain-trie"
