"""Four-bit integer weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.ir.weights import Int4
from elision.passes.base import Pass, register
from elision.passes.weights.floats import encode_floats


@register
@dataclass(frozen=True)
class Int4Weights(Pass):
    """Store float weights as four-bit codes with a scale and a minimum for each group of inputs.

    The rewrite in one sentence: the parameters of `linear`, `embed` and `experts` that are plain floats are rounded to the
    nearest of 16 steps from min to max of their group. ``group``: weights along the inputs that share an fp16 scale and minimum
    (32: the bytes of Q4_1, whose weights it gives back exactly). Weights whose rows are no whole groups stay.
    """

    group: int = 32

    name: ClassVar[str] = "int4"
    family: ClassVar[str] = "weights"
    changes: ClassVar[str] = "encodings"

    def apply(self, program: Program) -> None:
        encode_floats(program, Int4(self.group), self.text())
