"""How often guesses of each kind come true, counted while running."""

from __future__ import annotations

import numpy as np

from elision.ir.drafting.proposal import Array, Proposal

_MEMORY = 0.99  # what a count keeps when its kind is tried once more: the last hundred tries decide


class Rates:
    """For each kind of guess the chance that it is right if its parent is: ``right / tried``, beginning with a belief that is
    worth ``weight`` tries (a Beta prior)."""

    def __init__(self, belief: Array, weight: float = 2.0) -> None:
        self.right, self.tried = belief * weight, np.full(len(belief), weight)

    def of(self, kinds: Array) -> Array:
        """The chances, float64, below 1 so that more nodes never look certain."""
        found: Array = np.minimum(self.right[kinds] / self.tried[kinds], 0.995)
        return found

    def count(self, proposal: Proposal, tokens: Array) -> None:
        """Count a proposal's guesses that the tokens after its root settle."""
        settled, right = proposal.outcomes(tokens)
        self.add(proposal.kind[settled], right[settled])

    def add(self, kinds: Array, right: Array) -> None:
        """Count guesses ``[n]`` of these kinds."""
        n = len(self.tried)
        tried = np.bincount(kinds, minlength=n)
        fade = _MEMORY**tried
        self.tried = self.tried * fade + tried
        self.right = self.right * fade + np.bincount(kinds[right], minlength=n)
