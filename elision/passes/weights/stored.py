"""Keep the weights in the blocks that the model's file has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.retype import encodable, store
from elision.passes.base import Pass, register


@register
@dataclass(frozen=True)
class StoredWeights(Pass):
    """Weights of a GGUF file stay as they are stored: Q4_1, Q8_0, Q6_K and so on, each in its own format.

    The rewrite in one sentence: the types of the parameters that `linear`, `embed` and `experts` read become those of the
    file's blocks, and what reads them decodes them. The numbers are those of the file, so nothing changes but the bytes.
    Weights that the file has as expressions of what the model reads (a sum with 1) stay floats.
    """

    name: ClassVar[str] = "stored"
    family: ClassVar[str] = "weights"
    changes: ClassVar[str] = "encodings"
    quality: ClassVar[str] = "exact"

    def apply(self, program: Program) -> None:
        if not program.stored:
            raise BadInput(f"stored: the weights of {program.name} did not come in blocks; expected a quantised GGUF file")
        found = {name: program.stored[name] for name in encodable(program) if name in program.stored}
        if not found:
            raise BadInput(f"stored: none of the {len(program.stored)} weights with blocks is a float weight of the program")
        store(program, found)
