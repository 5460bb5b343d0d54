"""Sixteen-bit float weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.ir.program import Program
from elision.ir.weights import Blocks
from elision.passes.base import Pass, register
from elision.passes.weights.floats import encode_floats


@register
@dataclass(frozen=True)
class BFloat16Weights(Pass):
    """Store float weights of 32 and 64 bits in bfloat16.

    The rewrite in one sentence: the parameters of `linear`, `embed` and `experts` that are plain floats are rounded to 8 bits of
    mantissa; activations keep their dtype.
    """

    name: ClassVar[str] = "bf16"
    family: ClassVar[str] = "weights"
    changes: ClassVar[str] = "encodings"

    def apply(self, program: Program) -> None:
        encode_floats(program, Blocks("BF16"), self.text())
