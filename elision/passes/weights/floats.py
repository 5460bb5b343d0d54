"""What the passes that encode float weights have in common."""

from __future__ import annotations

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.retype import encodable, store
from elision.ir.types import Tensor
from elision.ir.weights import WeightEncoding


def encode_floats(program: Program, encoding: WeightEncoding, by: str) -> None:
    """Store in ``encoding`` the weights that still are plain floats and get smaller by it: those of `linear`, `embed` and
    `experts` whose rows are whole groups. Raises BadInput if there is none."""
    floats = encodable(program)
    chosen = {name: encoding for name, type in floats.items() if _smaller(type, encoding)}
    if not chosen:
        some = f"{len(floats)} float weights, as {next(iter(floats.values()))}" if floats else "no float weights"
        raise BadInput(f"{by}: nothing to store in {encoding}: {program.name} has {some} of linear, embed and experts")
    store(program, chosen)


def _smaller(type: Tensor, encoding: WeightEncoding) -> bool:
    try:
        return encoding.row_bytes(type.row) < type.row * type.itemsize
    except BadInput:
        return False
