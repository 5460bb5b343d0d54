"""GEAR: codes, and what makes good their rounding (Kang et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.states import KV, Int, Repaired
from elision.passes.base import Pass, register
from elision.passes.kv.caches import sizes
from elision.passes.kv.tail import behind_a_tail


@register
@dataclass(frozen=True)
class GEAR(Pass):
    """Older keys and values in ``bits`` bits, in blocks of ``block`` tokens that a matrix of low rank and a few outliers repair.

    The rewrite in one sentence: as `kivi`, every cache gets a quantised segment before a float one, and of every block that
    moves the ``outliers`` largest and smallest numbers of each vector (keys: a channel of the block; values: a token of a head)
    are kept apart, and the rest is rounded as `kivi` does, in groups of ``block``, with a matrix of rank ``rank`` beside it that
    is close to the rounding error. Published: 4 or 2 bits, blocks and groups of 64, rank 2 for decoded blocks and 4 for the
    prompt in one block, 2% outliers (here the prompt too comes in blocks, and one of each sign of 64 is 3%). ``outliers=0`` is
    GEAR-L. ``residual`` tokens and the block that is not full stay in floats. Identity setting: a ``residual`` of at least the
    context.
    """

    bits: int = 4
    block: int = 64
    rank: int = 2
    outliers: int = 1
    residual: int = 0

    name: ClassVar[str] = "gear"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        if self.bits not in (2, 4, 8):
            raise BadInput(f"{self.name}: bits={self.bits}; expected 2, 4 or 8")
        sizes(self.name, block=self.block)
        behind_a_tail(program, self.name, self.block, self.residual, self.encodings)

    def encodings(self, type: KV) -> tuple[Repaired, Repaired]:
        """Of keys and of values."""
        k = Int(self.bits, "token", self.block, zero=True)
        v = Int(self.bits, "channel", min(self.block, type.vdim), zero=True)
        return Repaired(k, self.block, self.rank, self.outliers), Repaired(v, self.block, self.rank, self.outliers)
