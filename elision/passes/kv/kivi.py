"""KIVI: keys quantised by channel, values by token, the last tokens not at all (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.states import KV, Int
from elision.passes.base import Pass, register
from elision.passes.kv.caches import sizes
from elision.passes.kv.tail import behind_a_tail


@register
@dataclass(frozen=True)
class KIVI(Pass):
    """Older keys and values in ``bits`` bits; at least the last ``residual`` tokens in full precision.

    The rewrite in one sentence: every cache becomes two segments under one softmax, and every ``group`` tokens, and after the
    prompt, ``group`` tokens at a time move from the float one to the quantised one, keys with a scale and a minimum for
    ``group`` tokens of a channel, values for ``group`` channels of a token (or all that a head has). The prompt attends to its
    own keys and values unrounded. Published defaults: 2 bits, groups of 32, a residual of 32 to 128. The paper moves keys when
    ``residual`` of them have come and values one by one; here both move on the clock and no round of drafts crosses it, so
    the tail holds ``residual`` to ``residual + group`` tokens. Identity setting: a ``residual`` of at least the context.
    """

    bits: int = 4
    group: int = 32
    residual: int = 128

    name: ClassVar[str] = "kivi"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        if self.bits not in (2, 4, 8):
            raise BadInput(f"{self.name}: bits={self.bits}; expected 2, 4 or 8")
        sizes(self.name, group=self.group)
        behind_a_tail(program, self.name, self.group, self.residual, self.encodings)

    def encodings(self, type: KV) -> tuple[Int, Int]:
        """Of keys and of values."""
        group = min(self.group, type.vdim)
        return Int(self.bits, "token", self.group, zero=True), Int(self.bits, "channel", group, zero=True)
