"""How kernels of a GPU want weights in memory: what lies side by side is read side by side.

A weight is up to three planes, of every bit of the stored rows (`elision.ir.weights`) and none more:

    codes      of floats [.., N, K] of their type; of codes of eight bits i8[.., N, K]; of fewer bits u8[.., N, row bytes], a row
               being, one after the other,
                   nibbles   K / 2        the low four bits: of every ``half`` bytes first the low, then the high nibbles
                   high      K * high / 8 the bits above them: of every ``order`` bytes first the lowest, then the next ones
                   scales    of its runs  16 signed bytes for a block (Q6_K), or 12 (Q4_K, Q5_K: `elision.ir.block_layout.plain6`)
    scales     d f16[.., N, K / block]
    minima     m f16[.., N, K / block]

and means ``(d * s) * (q - offset) + m``, or ``- m * t`` with minima of runs. `PlaneForm.text` says all that to a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.ir.block_layout import BlockLayout, block_layout, join
from elision.ir.weights import Blocks, WeightEncoding

_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class PlaneForm:
    """The planes of a weight whose blocks are ``layout``; None: its codes are floats."""

    layout: BlockLayout | None

    @property
    def text(self) -> str:
        """What a kernel has to know, in words ``name=number``; a number that is not there is 0."""
        layout = self.layout
        if layout is None:
            return "float"
        facts = {
            "bits": layout.bits, "half": layout.half if layout.bits == 4 else 0, "high": layout.high, "order": self.order,
            "run": layout.run, "block": layout.elements, "scales": layout.scales[1] if layout.scales else 0,
            "minimum": len(layout.numbers) - 1, "offset": layout.offset,
        }  # fmt: skip
        return " ".join(f"{name}={number}" for name, number in facts.items() if number)

    @property
    def block(self) -> int:
        """Weights that share their fp16 numbers."""
        return 1 if self.layout is None else self.layout.elements

    @property
    def codes(self) -> int:
        """Codes of a byte."""
        return 2 if self.layout is not None and self.layout.bits == 4 else 1

    @property
    def numbers(self) -> int:
        """Planes of fp16 numbers."""
        return 0 if self.layout is None else len(self.layout.numbers)

    @property
    def order(self) -> int:
        """Of bytes with high bits."""
        return 0 if self.layout is None else min(32, self.layout.high_bytes)

    @property
    def code(self) -> torch.dtype:
        return torch.int8 if self.codes == 1 else torch.uint8


def plane_form(encoding: WeightEncoding | None, k: int) -> PlaneForm | None:
    """How rows of ``k`` weights are read; None if they have to be decoded first, not being whole blocks."""
    if encoding is None or isinstance(encoding, Blocks) and encoding.format in _FLOATS:
        return PlaneForm(None)
    layout = block_layout(encoding, k)
    return None if layout is None or k % layout.elements else PlaneForm(layout)


def planes(weight: torch.Tensor, encoding: WeightEncoding | None, form: PlaneForm) -> tuple[torch.Tensor, ...]:
    """Codes, then scales, then minima, of a plain weight or of stored rows ``u8[.., N, row bytes]``."""
    layout = form.layout
    if layout is None:
        return (weight if encoding is None else weight.contiguous().view(_FLOATS[str(encoding)]),)
    blocks = torch.unflatten(weight, -1, (-1, layout.nbytes))
    numbers = [blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1) for at in layout.numbers]
    parts = [blocks[..., layout.low : layout.low + layout.low_bytes].flatten(-2)]
    if layout.high:
        high = layout.high_codes(blocks).flatten(-2)
        parts.append(join(torch.unflatten(high, -1, (-1, 8 // layout.high, form.order)), layout.high).flatten(-2))
    if layout.scales:
        parts.append(layout.run_scales(blocks).flatten(-2))
    return (torch.cat(parts, -1).view(form.code), *numbers)
