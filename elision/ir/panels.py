"""Panels of encoded weights: the blocks of 16 rows side by side, every stored bit kept (the order is in `elision.ir.packing`)."""

from __future__ import annotations

import torch

from elision.ir.block_layout import BlockLayout, block_layout, join, split, stored6
from elision.ir.weights import Int4, Int8, WeightEncoding

PANEL = 16  # outputs of a panel
QUAD = 4  # inputs whose codes lie side by side


def run_bytes(layout: BlockLayout) -> int:
    """Bytes of the codes of a run of one output."""
    return layout.run * (layout.bits + layout.high) // 8


def to_panels(layout: BlockLayout, rows: torch.Tensor) -> torch.Tensor:
    """Stored rows ``u8[.., 16 * p, row bytes]`` as panels ``u8[.., p, bytes]``."""
    *lead, n, size = rows.shape
    blocks = rows.reshape(*lead, n // PANEL, PANEL, size // layout.nbytes, layout.nbytes).transpose(-3, -2)
    parts = [blocks[..., at : at + 2].flatten(-2) for at in layout.numbers]
    if layout.scales:
        parts.append(layout.run_scales(blocks).transpose(-1, -2).flatten(-2))
    runs = []
    if layout.high:
        high = torch.unflatten(_by_run(layout, layout.high_codes(blocks)), -1, (-1, QUAD))  # [.., runs, 16, quads, 4]
        runs.append(join(high, layout.high).flatten(-2))
    low = torch.unflatten(_by_run(layout, layout.low_codes(blocks)), -1, (-1, QUAD))
    if layout.bits == 4:
        low = low[..., 0::2, :] | low[..., 1::2, :] << 4
    runs.append(low.transpose(-3, -2).flatten(-3))
    parts.append(torch.cat(runs, -1).flatten(-2))
    return torch.cat(parts, -1).flatten(-2)


def from_panels(layout: BlockLayout, data: torch.Tensor, blocks: int) -> torch.Tensor:
    """The stored rows ``u8[.., 16 * p, row bytes]`` of panels ``u8[.., p, bytes]`` of ``blocks`` blocks a row."""
    *lead, p, _ = data.shape
    panel = data.reshape(*lead, p, blocks, -1)
    found = data.new_empty((*lead, p, blocks, PANEL, layout.nbytes))
    at = 0
    for start in layout.numbers:
        found[..., start : start + 2] = torch.unflatten(panel[..., at : at + PANEL * 2], -1, (PANEL, 2))
        at += PANEL * 2
    if layout.scales:
        start, size = layout.scales
        scales = torch.unflatten(panel[..., at : at + PANEL * size], -1, (size, PANEL)).transpose(-1, -2)
        found[..., start : start + size] = stored6(scales) if size == 12 else scales
        at += PANEL * size
    runs = torch.unflatten(panel[..., at:], -1, (-1, PANEL * run_bytes(layout)))
    if layout.high:
        codes = _by_block(split(torch.unflatten(runs[..., : PANEL * QUAD], -1, (PANEL, QUAD)), layout.high).flatten(-2))
        shape = (-1, 8 // layout.high, layout.order or 1)
        high = join(torch.unflatten(codes, -1, shape), layout.high).flatten(-2)
        found[..., layout.high_at : layout.high_at + layout.high_bytes] = high
        runs = runs[..., PANEL * QUAD :]
    low = torch.unflatten(runs, -1, (-1, PANEL, QUAD)).transpose(-3, -2)
    if layout.bits == 4:
        low = torch.stack((low & 15, low >> 4), -2).flatten(-3, -2)
    codes = _by_block(low.flatten(-2))
    if layout.bits == 4:
        pairs = torch.unflatten(codes, -1, (-1, 2, layout.half))
        codes = (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)
    found[..., layout.low : layout.low + layout.low_bytes] = codes
    return found.transpose(-3, -2).reshape(*lead, p * PANEL, blocks * layout.nbytes)


def _by_run(layout: BlockLayout, codes: torch.Tensor) -> torch.Tensor:
    """``[.., 16, elements]`` as ``[.., runs, 16, run]``."""
    return torch.unflatten(codes, -1, (-1, layout.run)).transpose(-3, -2)


def _by_block(codes: torch.Tensor) -> torch.Tensor:
    return codes.transpose(-3, -2).flatten(-2)


def panel_layout(encoding: WeightEncoding, k: int) -> BlockLayout | None:
    """The blocks of rows of ``k`` weights that lie in panels; None if they have no such form."""
    size = {Int8: QUAD, Int4: 2 * QUAD}.get(type(encoding))
    found = block_layout(encoding, k)
    return None if found is None or size is not None and found.run % size else found
