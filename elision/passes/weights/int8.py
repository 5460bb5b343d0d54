"""Eight-bit integer weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.weights import Int8
from elision.passes.base import Pass, register
from elision.passes.weights.floats import encode_floats


@register
@dataclass(frozen=True)
class Int8Weights(Pass):
    """Store float weights as signed bytes with a scale for each group of inputs.

    The rewrite in one sentence: the parameters of `linear`, `embed` and `experts` that are plain floats are rounded to the
    nearest of 255 steps from -max to max of their group. ``group``: weights along the inputs that share an fp16 scale (32: the
    bytes of Q8_0), or ``row`` for one scale per output (the weights of LLM.int8, Dettmers et al. 2022). Weights whose rows are no
    whole groups stay.
    """

    group: int | str = 32

    name: ClassVar[str] = "int8"
    family: ClassVar[str] = "weights"
    changes: ClassVar[str] = "encodings"

    def apply(self, program: Program) -> None:
        if isinstance(self.group, str) and self.group != "row":
            raise BadInput(f"int8: group={self.group!r}; expected a number of weights, or row")
        encode_floats(program, Int8(None if isinstance(self.group, str) else self.group), self.text())
