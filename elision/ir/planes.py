"""How kernels of a GPU want weights in memory: codes, scales and minima apart, so that reads of codes are aligned.

``plane_form`` says how a weight of an encoding is read; `planes` makes the planes from stored rows (`elision.ir.weights`), and
`stored` the rows again: every bit kept, none added. Rows that have no such form are decoded when they are loaded.

    form       codes                      scales, minima        encodings
    float      [.., N, K] of their type   -                     none, BF16, F16
    int8       i8[.., N, K]               d f16[.., N, K / G]   Q8_0, int8
    nibbles    u8[.., N, K / 2]           d                     Q4_0
    nibbles+m  u8[.., N, K / 2]           d, m                  Q4_1, int4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.ir.weights import Blocks, Int4, Int8, WeightEncoding


@dataclass(frozen=True)
class PlaneForm:
    """``name``: how codes are read; ``group``: codes that share a scale; ``numbers``: fp16 numbers before the codes of a
    block."""

    name: str
    group: int = 1
    numbers: int = 0

    @property
    def code(self) -> torch.dtype:
        return torch.int8 if self.name == "int8" else torch.uint8

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a block."""
        return self.group if self.name == "int8" else self.group // 2


_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_BLOCKS = {"Q8_0": PlaneForm("int8", 32, 1), "Q4_0": PlaneForm("nibbles", 32, 1), "Q4_1": PlaneForm("nibbles+m", 32, 2)}


def plane_form(encoding: WeightEncoding | None, k: int) -> PlaneForm | None:
    """How rows of ``k`` weights are read; None if they have to be decoded first."""
    match encoding:
        case None:
            return PlaneForm("float")
        case Blocks(format):
            return PlaneForm("float") if format in _FLOATS else _BLOCKS.get(format)
        case Int8(group):
            return PlaneForm("int8", group or k, 1)
        case Int4(group):
            return PlaneForm("nibbles+m", group, 2)
    return None


def planes(weight: torch.Tensor, encoding: WeightEncoding | None, form: PlaneForm) -> tuple[torch.Tensor, ...]:
    """Codes, then scales, then minima, of a plain weight or of stored rows ``u8[.., N, row bytes]``."""
    if encoding is None:
        return (weight,)
    if form.name == "float":
        return (weight.contiguous().view(_FLOATS[str(encoding)]),)
    blocks = torch.unflatten(weight, -1, (-1, 2 * form.numbers + form.code_bytes))
    heads = [blocks[..., 2 * i : 2 * i + 2].contiguous().view(torch.float16).squeeze(-1) for i in range(form.numbers)]
    return (blocks[..., 2 * form.numbers :].flatten(-2).contiguous().view(form.code), *heads)


def stored(parts: tuple[torch.Tensor, ...], encoding: WeightEncoding | None, form: PlaneForm) -> torch.Tensor:
    """The weight that has these planes."""
    codes, *heads = parts
    if encoding is None:
        return codes
    if form.name == "float":
        return codes.view(torch.uint8)
    numbers = [h.contiguous().unsqueeze(-1).view(torch.uint8) for h in heads]
    codes = torch.unflatten(codes.view(torch.uint8), -1, (-1, form.code_bytes))
    return torch.cat((*numbers, codes), -1).flatten(-2)
