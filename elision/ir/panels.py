"""Panels of encoded weights: the blocks of 16 rows side by side, every stored bit kept (the order is in `elision.ir.packing`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.ir.weights import Blocks, Int4, Int8, WeightEncoding

PANEL = 16  # outputs of a panel
QUAD = 4  # inputs whose codes lie side by side


@dataclass(frozen=True)
class PanelLayout:
    """The blocks of one output within a panel, and where the parts lie in a stored block.

    ``numbers``: where the fp16 scale and minimum of a block are. ``scales``: where the scales of its runs are, and their bytes:
    16 signed, or 12 that hold 6-bit scales and minima. ``run``: weights that share a scale. ``bits``: of a code's low part (8 or
    4), at byte ``low``; of every ``half`` bytes first the low, then the high nibbles. ``high``: bits of a code's high part, at
    byte ``high_at``; of every ``order`` bytes first the lowest bits, then the next ones (0: all bits of a byte, then the next
    byte). ``offset``: what is subtracted from a code.
    """

    elements: int
    nbytes: int
    numbers: tuple[int, ...]
    run: int
    low: int
    bits: int = 4
    half: int = 16
    high: int = 0
    high_at: int = 0
    order: int = 0
    scales: tuple[int, int] | None = None
    offset: int = 0

    @property
    def head_bytes(self) -> int:
        """Bytes of one output before the first run of a block."""
        return 2 * len(self.numbers) + (self.scales[1] if self.scales else 0)

    @property
    def run_bytes(self) -> int:
        """Bytes of a run of one output."""
        return self.run * (self.bits + self.high) // 8

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """Stored rows ``u8[.., 16 * p, row bytes]`` as panels ``u8[.., p, bytes]``."""
        *lead, n, size = rows.shape
        blocks = rows.reshape(*lead, n // PANEL, PANEL, size // self.nbytes, self.nbytes).transpose(-3, -2)
        parts = [blocks[..., at : at + 2].flatten(-2) for at in self.numbers]
        if self.scales:
            at, size = self.scales
            scales = blocks[..., at : at + size]
            parts.append((_scales6(scales) if size == 12 else scales).transpose(-1, -2).flatten(-2))
        runs = []
        if self.high:
            high = torch.unflatten(self._by_run(self._high(blocks)), -1, (-1, QUAD))  # [.., runs, 16, quads, 4]
            runs.append(_join(high, self.high).flatten(-2))
        low = torch.unflatten(self._by_run(self._low(blocks)), -1, (-1, QUAD))
        if self.bits == 4:
            low = low[..., 0::2, :] | low[..., 1::2, :] << 4
        runs.append(low.transpose(-3, -2).flatten(-3))
        parts.append(torch.cat(runs, -1).flatten(-2))
        return torch.cat(parts, -1).flatten(-2)

    def unpack(self, data: torch.Tensor, blocks: int) -> torch.Tensor:
        """The stored rows ``u8[.., 16 * p, row bytes]`` of panels ``u8[.., p, bytes]`` of ``blocks`` blocks a row."""
        *lead, p, _ = data.shape
        panel = data.reshape(*lead, p, blocks, -1)
        found = data.new_empty((*lead, p, blocks, PANEL, self.nbytes))
        at = 0
        for start in self.numbers:
            found[..., start : start + 2] = torch.unflatten(panel[..., at : at + PANEL * 2], -1, (PANEL, 2))
            at += PANEL * 2
        if self.scales:
            start, size = self.scales
            scales = torch.unflatten(panel[..., at : at + PANEL * size], -1, (size, PANEL)).transpose(-1, -2)
            found[..., start : start + size] = _stored6(scales) if size == 12 else scales
            at += PANEL * size
        runs = torch.unflatten(panel[..., at:], -1, (-1, PANEL * self.run_bytes))
        if self.high:
            high = _split(torch.unflatten(runs[..., : PANEL * QUAD], -1, (PANEL, QUAD)), self.high)
            self._put_high(found, self._by_block(high.flatten(-2)))
            runs = runs[..., PANEL * QUAD :]
        low = torch.unflatten(runs, -1, (-1, PANEL, QUAD)).transpose(-3, -2)
        if self.bits == 4:
            low = torch.stack((low & 15, low >> 4), -2).flatten(-3, -2)
        codes = self._by_block(low.flatten(-2))
        if self.bits == 8:
            found[..., self.low : self.low + self.elements] = codes
        else:
            pairs = torch.unflatten(codes, -1, (-1, 2, self.half))
            found[..., self.low : self.low + self.elements // 2] = (pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(-2)
        return found.transpose(-3, -2).reshape(*lead, p * PANEL, blocks * self.nbytes)

    def _by_run(self, codes: torch.Tensor) -> torch.Tensor:
        """``[.., 16, elements]`` as ``[.., runs, 16, run]``."""
        return torch.unflatten(codes, -1, (-1, self.run)).transpose(-3, -2)

    def _by_block(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.transpose(-3, -2).flatten(-2)

    def _low(self, blocks: torch.Tensor) -> torch.Tensor:
        """Low parts of the codes in the order of the weights, ``[.., elements]``."""
        data = blocks[..., self.low : self.low + self.elements * self.bits // 8]
        if self.bits == 8:
            return data
        halves = torch.unflatten(data, -1, (-1, self.half))
        return torch.stack((halves & 15, halves >> 4), -2).flatten(-3)

    def _high(self, blocks: torch.Tensor) -> torch.Tensor:
        data = blocks[..., self.high_at : self.high_at + self.elements * self.high // 8]
        if not self.order:
            return _split(data.unsqueeze(-1), self.high).flatten(-3)
        return _split(torch.unflatten(data, -1, (-1, self.order)), self.high).flatten(-3)

    def _put_high(self, found: torch.Tensor, codes: torch.Tensor) -> None:
        shape = (-1, 8 // self.high, self.order or 1)
        found[..., self.high_at : self.high_at + self.elements * self.high // 8] = _join(
            torch.unflatten(codes, -1, shape), self.high
        ).flatten(-2)


def panel_layout(encoding: WeightEncoding, k: int) -> PanelLayout | None:
    """How rows of ``k`` weights of an encoding lie in panels; None if they have no such form."""
    if isinstance(encoding, Blocks):
        return _FORMATS.get(encoding.format)
    if isinstance(encoding, Int8):
        size = encoding.group or k
        return None if size % QUAD else PanelLayout(size, 2 + size, (0,), size, 2, 8)
    assert isinstance(encoding, Int4)
    size = encoding.group
    return None if size % (2 * QUAD) else PanelLayout(size, 4 + size // 2, (0, 2), size, 4, 4, size // 2)


_FORMATS = {
    "Q8_0": PanelLayout(32, 34, (0,), 32, 2, 8),
    "Q4_0": PanelLayout(32, 18, (0,), 32, 2, offset=8),
    "Q4_1": PanelLayout(32, 20, (0, 2), 32, 4),
    "Q5_0": PanelLayout(32, 22, (0,), 32, 6, high=1, high_at=2, offset=16),
    "Q5_1": PanelLayout(32, 24, (0, 2), 32, 8, high=1, high_at=4),
    "Q4_K": PanelLayout(256, 144, (0, 2), 32, 16, half=32, scales=(4, 12)),
    "Q5_K": PanelLayout(256, 176, (0, 2), 32, 48, half=32, high=1, high_at=16, order=32, scales=(4, 12)),
    "Q6_K": PanelLayout(256, 210, (208,), 16, 0, half=64, high=2, high_at=128, order=32, scales=(192, 16), offset=32),
}


def _split(data: torch.Tensor, width: int) -> torch.Tensor:
    """``[.., b]`` bytes as ``[.., 8 / width, b]``: their lowest ``width`` bits, the next ones, and so on."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)
    bits: torch.Tensor = (data.unsqueeze(-2) >> shifts[:, None]) & (2**width - 1)
    return bits


def _join(bits: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `_split`: ``[.., 8 / width, b]`` to ``[.., b]``."""
    found = bits[..., 0, :].clone()
    for i in range(1, 8 // width):
        found |= bits[..., i, :] << (i * width)
    return found


def _scales6(b: torch.Tensor) -> torch.Tensor:
    """Twelve bytes of 6-bit scales s and minima t of eight runs (see `elision.ir.blocks`), the same bits in a plain order:
    byte r has the low nibbles of s and t of run r, byte 8 + i the two high bits of s and t of run 2 i, then of run 2 i + 1."""
    first, second, low = b[..., :4], b[..., 4:8], b[..., 8:12]
    nibbles = torch.cat(((first & 15) | (second & 15) << 4, low), -1)
    s = torch.unflatten(torch.cat((first >> 4 & 3, first >> 6), -1), -1, (4, 2))
    t = torch.unflatten(torch.cat((second >> 4 & 3, second >> 6), -1), -1, (4, 2))
    high = s[..., 0] | t[..., 0] << 2 | s[..., 1] << 4 | t[..., 1] << 6
    return torch.cat((nibbles, high), -1)


def _stored6(b: torch.Tensor) -> torch.Tensor:
    """The inverse of `_scales6`."""
    nibbles, high = b[..., :8], b[..., 8:]
    s = torch.stack((high & 3, high >> 4 & 3), -1).flatten(-2)
    t = torch.stack((high >> 2 & 3, high >> 6), -1).flatten(-2)
    first = (nibbles[..., :4] & 15) | s[..., :4] << 4 | s[..., 4:] << 6
    second = (nibbles[..., :4] >> 4) | t[..., :4] << 4 | t[..., 4:] << 6
    return torch.cat((first, second, nibbles[..., 4:]), -1)
