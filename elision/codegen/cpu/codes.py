"""The integer formats whose codes are multiplied with int8 activations, in the panels of `elision.ir.packing`: per panel and
group of 32 inputs 16 fp16 scales (and minima), then codes, four consecutive inputs of an output side by side."""

from __future__ import annotations

from dataclasses import dataclass

from elision.ir.packing import PANEL
from elision.ir.weights import GROUP, Blocks, Int4, Int8, weight_encoding


@dataclass(frozen=True)
class Codes:
    """How a format's codes become weights: ``scale * (code - offset) + minimum``."""

    bits: int
    offset: int = 0
    minimum: bool = False
    per_group: bool = True

    @property
    def header(self) -> int:
        """Bytes of scales and minima, of a group or of a panel."""
        return 2 * PANEL * (2 if self.minimum else 1)

    @property
    def group_bytes(self) -> int:
        return self.bits * PANEL * GROUP // 8 + (self.header if self.per_group else 0)


def codes_of(format: str) -> Codes:
    """The codes of a format, one that `elision.ir.weights.integer_groups` allows."""
    encoding = weight_encoding(format)
    if isinstance(encoding, Int8):
        return Codes(8, per_group=encoding.group is not None)
    if isinstance(encoding, Int4):
        return Codes(4, minimum=True)
    assert isinstance(encoding, Blocks)
    return {"Q8_0": Codes(8), "Q4_1": Codes(4, minimum=True), "Q4_0": Codes(4, 8)}[encoding.format]
