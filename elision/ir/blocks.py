"""Block formats of stored weights, and what their bytes mean.

A row of weights is a run of blocks: ``elements`` weights in ``nbytes`` bytes, with the scales of the block among them.
With d and m the fp16 scale and minimum of a block, widened to fp32, and q a weight's code:

    F32, F16, BF16   w = q
    Q4_0   w = d * (q - 8)             Q4_1   w = d * q + m
    Q5_0   w = d * (q - 16)            Q5_1   w = d * q + m
    Q8_0   w = d * q
    Q4_K   w = (d * s) * q - (m * t)   s, t: 6-bit scale and minimum of a run of 32 weights
    Q5_K   likewise, with 5-bit codes
    Q6_K   w = (d * s) * (q - 32)      s: 8-bit scale of a run of 16 weights

`decode` computes exactly this: every product and sum rounded to fp32, in this order, none fused. It is the reference of the
formats of GGUF (ggml's ``dequantize_row_*``; compiled with fused multiply-add, those may differ in the last bit where a
minimum is added).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from elision.errors import BadInput


@dataclass(frozen=True)
class BlockFormat:
    """``elements`` weights in ``nbytes`` bytes; ``decode``: blocks ``u8[n, nbytes]`` to weights ``f32[n, elements]``."""

    name: str
    elements: int
    nbytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of ``width`` weights. Raises BadInput unless it consists of whole blocks."""
        if width % self.elements:
            raise BadInput(f"{self.name} stores weights in blocks of {self.elements}; a row of {width} is not whole blocks")
        return width // self.elements * self.nbytes

    def decode_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The weights ``f32[..., width]`` of stored rows ``u8[.., row bytes]``. Raises BadInput unless these are whole blocks."""
        if rows.dtype != torch.uint8 or rows.dim() == 0 or rows.shape[-1] % self.nbytes:
            shown = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise BadInput(f"{self.name} rows are bytes, {self.nbytes} for {self.elements} weights; got {shown}")
        weights = self.decode(rows.reshape(-1, self.nbytes))
        return weights.reshape(*rows.shape[:-1], rows.shape[-1] // self.nbytes * self.elements)


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as it is stored: ``blocks u8[..., row bytes]`` in ``format``, then ``more`` rows that lie elsewhere; weight row r
    is stored row ``rows[r]`` (None: r)."""

    format: str
    blocks: torch.Tensor
    rows: torch.Tensor | None = None
    more: tuple[torch.Tensor, ...] = ()

    def in_order(self) -> torch.Tensor:
        """The stored rows ``u8[..., rows, row bytes]`` of a weight of two or more axes, in its order (a view if it is theirs)."""
        blocks = torch.cat((self.blocks, *self.more), -2) if self.more else self.blocks
        return blocks if self.rows is None else blocks[self.rows]

    def decode(self) -> torch.Tensor:
        """The weight ``f32[..., width]``."""
        parts = [decode(b, self.format) for b in (self.blocks, *self.more)]
        weight = torch.cat(parts, -2) if self.more else parts[0]
        return weight if self.rows is None else weight[self.rows]


def block_format(name: str) -> BlockFormat:
    """The format of this name. Raises BadInput naming those there are."""
    if name not in FORMATS:
        raise BadInput(f"unknown block format {name!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def decode(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """The weights ``f32[..., width]`` of stored rows ``u8[..., row bytes]``. Raises BadInput unless these are whole blocks."""
    return block_format(name).decode_rows(blocks)


def _plain(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda blocks: _typed(blocks, dtype).float()


def _typed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes read as ``dtype``: a copy where they are not aligned to it."""
    starts = (data.data_ptr(), *data.stride()[:-1])  # strides count even where there is one block
    aligned = data.is_contiguous() and all(n % dtype.itemsize == 0 for n in starts)
    return (data if aligned else data.clone(memory_format=torch.contiguous_format)).view(dtype)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The fp16 number at this byte of every block, ``f32[n, 1]``."""
    return _typed(blocks[:, at : at + 2], torch.float16).float()


def _nibbles(data: torch.Tensor, run: int) -> torch.Tensor:
    """``[n, b]`` bytes to ``[n, 2 b]`` codes: of every ``run`` bytes first the low, then the high nibbles."""
    runs = data.reshape(len(data), -1, 1, run)
    return torch.cat((runs & 15, runs >> 4), 2).flatten(1)


def _bits(data: torch.Tensor, width: int) -> torch.Tensor:
    """``[n, b]`` bytes to ``[n, 8 / width, b]``: their lowest ``width`` bits, the next ones, and so on."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    bits: torch.Tensor = (data.unsqueeze(1) >> shifts[:, None]) & (2**width - 1)
    return bits


def _fifth(data: torch.Tensor) -> torch.Tensor:
    """Four bytes to the fifth bits ``[n, 32]`` of 32 codes, bit j of the little-endian number for code j."""
    return _bits(data, 1).transpose(1, 2).flatten(1) << 4


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return (_nibbles(b[:, 2:], 16).float() - 8).mul_(_half(b, 0))


def scaled_nibbles(b: torch.Tensor) -> torch.Tensor:
    """Q4_1 with any number of codes: fp16 scale and minimum, then nibbles, those of the first half of the block low."""
    return _nibbles(b[:, 4:], b.shape[1] - 4).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(b[:, 6:], 16) | _fifth(b[:, 2:6])
    return (codes.float() - 16).mul_(_half(b, 0))


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(b[:, 8:], 16) | _fifth(b[:, 4:8])
    return codes.float().mul_(_half(b, 0)).add_(_half(b, 2))


def scaled_bytes(b: torch.Tensor) -> torch.Tensor:
    """Q8_0 with any number of codes: an fp16 scale, then signed bytes."""
    return _typed(b[:, 2:], torch.int8).float().mul_(_half(b, 0))


def _scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima ``[n, 8, 1]`` of the eight runs of a Q4_K or Q5_K block: d * s and m * t.

    Twelve bytes hold eight scales and eight minima of six bits: of the first four scales (bytes 0-3) and minima (bytes 4-7)
    all bits, of the other four the low nibbles (bytes 8-11: scale low, minimum high), their top two bits above the former.
    """
    first, second, low = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat((first & 63, (low & 15) | (first >> 6 << 4)), 1)
    minimum = torch.cat((second & 63, (low >> 4) | (second >> 6 << 4)), 1)
    return (_half(b, 0) * scale.float()).unsqueeze(2), (_half(b, 2) * minimum.float()).unsqueeze(2)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scales(b)
    codes = _nibbles(b[:, 16:], 32).float().view(-1, 8, 32)
    return codes.mul_(scale).sub_(minimum).flatten(1)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scales(b)
    codes = _nibbles(b[:, 48:], 32).view(-1, 8, 32) | (_bits(b[:, 16:48], 1) << 4)
    return codes.float().mul_(scale).sub_(minimum).flatten(1)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    low = _nibbles(b[:, :128], 64).view(-1, 2, 4, 32)  # halves of 128 weights, quarters of 32
    high = torch.stack((_bits(b[:, 128:160], 2), _bits(b[:, 160:192], 2)), 1)
    scale = _half(b, 208) * _typed(b[:, 192:208], torch.int8).float()
    codes = (low | (high << 4)).float().sub_(32).view(-1, 16, 16)
    return codes.mul_(scale.unsqueeze(2)).flatten(1)


#: All block formats by name.
FORMATS: dict[str, BlockFormat] = {
    form.name: form
    for form in (
        BlockFormat("F32", 1, 4, _plain(torch.float32)),
        BlockFormat("F16", 1, 2, _plain(torch.float16)),
        BlockFormat("BF16", 1, 2, _plain(torch.bfloat16)),
        BlockFormat("Q4_0", 32, 18, _q4_0),
        BlockFormat("Q4_1", 32, 20, scaled_nibbles),
        BlockFormat("Q5_0", 32, 22, _q5_0),
        BlockFormat("Q5_1", 32, 24, _q5_1),
        BlockFormat("Q8_0", 32, 34, scaled_bytes),
        BlockFormat("Q4_K", 256, 144, _q4_k),
        BlockFormat("Q5_K", 256, 176, _q5_k),
        BlockFormat("Q6_K", 256, 210, _q6_k),
    )
}
