"""Keys and values as integers with a scale for each group of channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.encoding import check
from elision.ir.program import Program
from elision.ir.states import KV, Int
from elision.passes.base import Pass, register
from elision.passes.kv.caches import Cached


@register
@dataclass(frozen=True)
class QuantisedKV(Pass):
    """Store every key and value in ``bits`` bits, rounded to nearest as it is appended, keys after their rotation.

    The rewrite in one sentence: the rows of every cache get the encoding `elision.ir.states.Int`, symmetric, with one scale for
    ``group`` channels of a head (0: for all of them); four bits also have a minimum. Drafted rows are rounded as committed ones
    are, so speculation changes nothing. Usual settings: 8 bits with a scale for a row, 4 bits in groups of 32 to 128. Native code
    reads these, of a key up to eight groups, of a value groups of multiples of 16 channels or all of them; the host computes
    attention over other groups, which is slow. Error of a number: at most half of its group's scale. Plain rounding, of no paper;
    ``kv_dtype="int8"`` (`insert-cache`) asks for the 8 bits of the default from the beginning. There is no setting that rounds
    nothing: leave the pass out.
    """

    bits: int = 8
    group: int = 0

    name: ClassVar[str] = "kv-quant"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        if self.bits not in (4, 8):
            raise BadInput(f"{self.name}: bits={self.bits}; expected 8 or 4")
        if self.group < 0:
            raise BadInput(f"{self.name}: group={self.group}; expected channels of a head, or 0 for all of them")
        cached = Cached(program, self.name)
        for name, type in cached.states.items():
            if len(type.main) != 1:
                raise BadInput(f"{self.name}: {name} has been compressed by another pass; apply one of them")
        cached.retype(self.stored)

    def stored(self, type: KV) -> KV:
        """The cache with rows of integers."""
        k, v = (Int(self.bits, "channel", self.group or dim, zero=self.bits == 4) for dim in (type.dim, type.vdim))
        check(k, type.dim)
        check(v, type.vdim)
        return replace(type, segments=tuple(replace(s, k=k, v=v) for s in type.segments))
