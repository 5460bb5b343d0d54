"""Drafts copied from the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.passes.base import register
from elision.passes.speculate.table import TablePass


@register
@dataclass(frozen=True)
class PromptLookup(TablePass):
    """Prompt Lookup Decoding (Saxena 2023): draft what followed the most recent earlier occurrence of the last ``match`` tokens,
    up to ``length`` tokens. Published defaults: 3 and 10. For text that repeats its prompt: summaries, edits, quotes."""

    match: int = 3
    length: int = 10

    name: ClassVar[str] = "prompt-lookup"
