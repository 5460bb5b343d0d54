"""Panels of integer codes (see `elision.ir.packing`): per panel and group of 32 inputs 16 fp16 scales (and minima), then codes, four
consecutive inputs of an output side by side.

int8: ``[8][16][4]`` signed bytes a group. Four bits: ``[4][16][4]`` bytes, with inputs 8 i .. 8 i + 3 in the low nibbles and the next four
in the high ones. One scale per row: 16 fp16 scales a panel, then the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.ir.packing import PANEL, panels
from elision.ir.weights import GROUP, Blocks, Int4, Int8, WeightEncoding


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


def codes_of(encoding: WeightEncoding) -> Codes:
    """The codes of an encoding that `elision.ir.weights.integer_groups` allows."""
    if isinstance(encoding, Int8):
        return Codes(8, per_group=encoding.group is not None)
    if isinstance(encoding, Int4):
        return Codes(4, minimum=True)
    assert isinstance(encoding, Blocks)
    return {"Q8_0": Codes(8), "Q4_1": Codes(4, minimum=True), "Q4_0": Codes(4, 8)}[encoding.format]


def panel_bytes(codes: Codes, k: int) -> int:
    return (0 if codes.per_group else codes.header) + k // GROUP * codes.group_bytes


def pack_codes(rows: torch.Tensor, encoding: WeightEncoding, k: int) -> torch.Tensor:
    """The bytes of stored rows ``u8[N, row bytes]`` of ``k`` weights."""
    codes, n = codes_of(encoding), len(rows)
    form = encoding.block(k)
    padded = rows.new_zeros((panels(n) * PANEL, rows.shape[-1]))
    padded[:n] = rows
    blocks = padded.view(-1, PANEL, k // form.elements, form.nbytes)
    fields = 4 if codes.minimum else 2
    data = blocks[..., fields:]
    if codes.bits == 4:
        data = torch.cat((data & 15, data >> 4), -1)
    quads = data.reshape(len(blocks), PANEL, k // GROUP, GROUP // 4, 4).permute(0, 2, 3, 1, 4)  # [P][G][8][16][4]
    if codes.bits == 4:
        quads = quads[:, :, 0::2] | quads[:, :, 1::2] << 4
    header = blocks[..., :fields].reshape(len(blocks), PANEL, -1, fields // 2, 2).permute(0, 2, 3, 1, 4)
    header = header.reshape(len(blocks), header.shape[1], -1)
    quads = quads.reshape(len(blocks), k // GROUP, -1)
    if not codes.per_group:
        return torch.cat((header[:, 0], quads.flatten(1)), 1).flatten()
    return torch.cat((header, quads), 2).flatten()


def unpack_codes(data: torch.Tensor, encoding: WeightEncoding, n: int, k: int) -> torch.Tensor:
    """The stored rows ``u8[n, row bytes]`` again."""
    codes, groups = codes_of(encoding), k // GROUP
    form, fields = encoding.block(k), 4 if codes.minimum else 2
    panel = data.view(-1, panel_bytes(codes, k))
    if codes.per_group:
        whole = panel.view(len(panel), groups, codes.group_bytes)
        header, quads = whole[..., : codes.header], whole[..., codes.header :]
    else:
        header, quads = panel[:, None, : codes.header], panel[:, codes.header :]
    quads = quads.reshape(len(panel), groups, -1, PANEL, 4)
    if codes.bits == 4:
        quads = torch.stack((quads & 15, quads >> 4), 3).flatten(2, 3)
    data = quads.permute(0, 3, 1, 2, 4).reshape(len(panel), PANEL, -1, form.elements)
    if codes.bits == 4:
        data = data[..., : form.elements // 2] | data[..., form.elements // 2 :] << 4
    header = header.reshape(len(panel), -1, fields // 2, PANEL, 2).permute(0, 3, 1, 2, 4).flatten(3)
    return torch.cat((header, data), -1).reshape(len(panel) * PANEL, -1)[:n]
