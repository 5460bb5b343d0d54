"""Passes that choose numbers by what a decode step takes on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elision.ir.program import Program
from elision.passes.base import Pass

#: Seconds of a decode step, by program and by how many tokens came before.
Clock = Callable[[Sequence[Program], Sequence[int]], Sequence[Sequence[float]]]

#: Passes of these kinds do to each layer what they do to the others, so a step can be timed with them before they are applied.
LATER = ("cache", "encodings")


class Timed(Pass):
    """A pass that chooses some of its own fields by the time of a step, so that its text says what was chosen; `apply` chooses by
    the bytes of weights where nothing was timed (no native code, or no decoder)."""

    def timed(self, program: Program, clock: Clock) -> Pass:
        """The pass with these fields, chosen for the program that it is about to change (which stays as it is)."""
        raise NotImplementedError
