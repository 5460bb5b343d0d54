"""Where the parts of an encoded weight's block lie (`elision.ir.blocks` says what they mean): one description for all formats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.ir.weights import Blocks, Int4, Int8, WeightEncoding


@dataclass(frozen=True)
class BlockLayout:
    """The parts of a stored block of ``elements`` weights.

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
    def low_bytes(self) -> int:
        return self.elements * self.bits // 8

    @property
    def high_bytes(self) -> int:
        return self.elements * self.high // 8

    def low_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        """Low parts of the codes of blocks ``u8[.., nbytes]`` in the order of the weights, ``[.., elements]``."""
        data = blocks[..., self.low : self.low + self.low_bytes]
        if self.bits == 8:
            return data
        halves = torch.unflatten(data, -1, (-1, self.half))
        return torch.stack((halves & 15, halves >> 4), -2).flatten(-3)

    def high_codes(self, blocks: torch.Tensor) -> torch.Tensor:
        """High parts of the codes, likewise."""
        data = blocks[..., self.high_at : self.high_at + self.high_bytes]
        return split(torch.unflatten(data, -1, (-1, self.order or 1)), self.high).flatten(-3)

    def run_scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """The scales of the runs as they lie there; twelve bytes in the plain order of `plain6`."""
        assert self.scales is not None
        at, size = self.scales
        found = blocks[..., at : at + size]
        return plain6(found) if size == 12 else found


def block_layout(encoding: WeightEncoding, k: int) -> BlockLayout | None:
    """The blocks of rows of ``k`` weights; None for floats."""
    if isinstance(encoding, Blocks):
        return _FORMATS.get(encoding.format)
    if isinstance(encoding, Int8):
        size = encoding.group or k
        return BlockLayout(size, 2 + size, (0,), size, 2, 8)
    assert isinstance(encoding, Int4)
    size = encoding.group
    return BlockLayout(size, 4 + size // 2, (0, 2), size, 4, 4, size // 2)


_FORMATS = {
    "Q8_0": BlockLayout(32, 34, (0,), 32, 2, 8),
    "Q4_0": BlockLayout(32, 18, (0,), 32, 2, offset=8),
    "Q4_1": BlockLayout(32, 20, (0, 2), 32, 4),
    "Q5_0": BlockLayout(32, 22, (0,), 32, 6, high=1, high_at=2, offset=16),
    "Q5_1": BlockLayout(32, 24, (0, 2), 32, 8, high=1, high_at=4),
    "Q4_K": BlockLayout(256, 144, (0, 2), 32, 16, half=32, scales=(4, 12)),
    "Q5_K": BlockLayout(256, 176, (0, 2), 32, 48, half=32, high=1, high_at=16, order=32, scales=(4, 12)),
    "Q6_K": BlockLayout(256, 210, (208,), 16, 0, half=64, high=2, high_at=128, order=32, scales=(192, 16), offset=32),
}


def split(data: torch.Tensor, width: int) -> torch.Tensor:
    """``[.., b]`` bytes as ``[.., 8 / width, b]``: their lowest ``width`` bits, the next ones, and so on."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)
    bits: torch.Tensor = (data.unsqueeze(-2) >> shifts[:, None]) & (2**width - 1)
    return bits


def join(bits: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `split`: ``[.., 8 / width, b]`` to ``[.., b]``."""
    found = bits[..., 0, :].clone()
    for i in range(1, 8 // width):
        found |= bits[..., i, :] << (i * width)
    return found


def plain6(b: torch.Tensor) -> torch.Tensor:
    """Twelve bytes of 6-bit scales s and minima t of eight runs (see `elision.ir.blocks`), the same bits in a plain order:
    byte r has the low nibbles of s and t of run r, byte 8 + i the two high bits of s and t of run 2 i, then of run 2 i + 1."""
    first, second, low = b[..., :4], b[..., 4:8], b[..., 8:12]
    nibbles = torch.cat(((first & 15) | (second & 15) << 4, low), -1)
    s = torch.unflatten(torch.cat((first >> 4 & 3, first >> 6), -1), -1, (4, 2))
    t = torch.unflatten(torch.cat((second >> 4 & 3, second >> 6), -1), -1, (4, 2))
    high = s[..., 0] | t[..., 0] << 2 | s[..., 1] << 4 | t[..., 1] << 6
    return torch.cat((nibbles, high), -1)


def stored6(b: torch.Tensor) -> torch.Tensor:
    """The inverse of `plain6`."""
    nibbles, high = b[..., :8], b[..., 8:]
    s = torch.stack((high & 3, high >> 4 & 3), -1).flatten(-2)
    t = torch.stack((high >> 2 & 3, high >> 6), -1).flatten(-2)
    first = (nibbles[..., :4] & 15) | s[..., :4] << 4 | s[..., 4:] << 6
    second = (nibbles[..., :4] >> 4) | t[..., :4] << 4 | t[..., 4:] << 6
    return torch.cat((first, second, nibbles[..., 4:]), -1)
