"""Prompt lookup: what followed the last few tokens when they were there before."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from elision.ir.drafting.drafter import Drafter, register
from elision.ir.drafting.proposal import Array, Proposal, chain
from elision.ir.drafting.rates import Rates


@register
class PromptLookup(Drafter):
    """Prompt Lookup Decoding (Saxena 2023): the continuation of the most recent earlier occurrence of the last ``match`` tokens
    (or fewer, down to one), up to ``length`` tokens. The kind of a guess is the length of the match and its distance from it."""

    name: ClassVar[str] = "prompt-lookup"

    def __init__(self, vocabulary: int, match: int = 3, length: int = 10) -> None:
        self.match, self.length = match, length
        self.template = chain(0, np.zeros(length, np.int64), np.arange(length))
        start = 0.7 * np.arange(1, match + 1) / match
        self.rates = Rates(np.repeat(start, length) + 0.1 * np.tile(np.minimum(np.arange(length), 2), match))

    def propose(self, history: Array, prompt: int, depth: int) -> Proposal | None:
        end = len(history)
        for m in range(min(self.match, end - 1), 0, -1):
            suffix = history[end - m :]
            ends = history[m - 1 : end - 1] == suffix[-1]
            for j in range(1, m):
                ends &= history[m - 1 - j : end - 1 - j] == suffix[-1 - j]
            if not ends.any():
                continue
            after = end - 1 - int(ends[::-1].argmax())
            tokens = history[after : after + min(self.length, depth)]
            return chain(int(history[-1]), tokens, (m - 1) * self.length + np.arange(len(tokens)))
        return None
