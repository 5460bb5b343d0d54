"""Encodings of weights: how the rows of a parameter are stored, and what the bytes mean.

An encoded weight of shape ``[.., rows, width]`` (``width`` runs along the inputs of a product) is one tensor
``u8[.., rows, row bytes]``, C order. A row is a run of blocks, a block a run of weights with its scale before its codes, numbers
little-endian; every row starts anew, and nothing lies between blocks. With d and m fp16 numbers widened to fp32:

    Q4_1 ..            a block format of GGUF (`elision.ir.blocks`)
    BF16, F16          2 bytes a weight, likewise
    int8(group=n)      block of n weights, 2 + n bytes:      d, then n signed codes                    w = d * q
    int8(group=row)    one block a row, 2 + width bytes:     the same                                  w = d * q
    int4(group=n)      block of n weights, 4 + n / 2 bytes:  d, m, then n / 2 bytes of two codes:      w = d * q + m
                       byte i has weight i in its low and weight i + n / 2 in its high nibble

So ``int8(group=32)`` has the bytes of Q8_0 and ``int4(group=32)`` those of Q4_1. Products and sums are rounded to fp32, in this
order, not fused; then the weight is rounded to the dtype of its type. Encoding rounds to nearest (ties to even), with

    int8    d = max|w| / 127, rounded up to fp16      |w' - w| <= d / 2
    int4    m = min w, rounded down, d = (max w - m) / 15, rounded up       |w' - w| <= d / 2, up to fp32 rounding

except that int4 gives back the very numbers of a group that are d * q + m already, for d > 0 and more than one q: from a decoded
Q4_1 weight come its own numbers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir import integers
from elision.ir.blocks import FORMATS, BlockFormat, block_format, scaled_bytes, scaled_nibbles


class WeightEncoding(ABC):
    """How the rows of a weight are stored."""

    @abstractmethod
    def block(self, width: int) -> BlockFormat:
        """The blocks of a row of ``width`` weights."""

    @abstractmethod
    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        """Stored rows ``u8[.., row bytes]`` of ``weight f32[.., width]``. Raises BadInput unless its rows are whole groups of
        finite numbers that the encoding can hold."""

    def row_bytes(self, width: int) -> int:
        """Bytes of a stored row of ``width`` weights. Raises BadInput unless it consists of whole blocks."""
        if width < 1:
            raise BadInput(f"{self}: a row of {width} weights; expected at least 1")
        return self.block(width).row_bytes(width)

    def decode(self, rows: torch.Tensor, width: int) -> torch.Tensor:
        """The weights ``f32[.., width]`` of stored rows ``u8[.., row bytes]``. Raises BadInput for rows of another length."""
        if rows.dtype != torch.uint8 or rows.dim() == 0 or rows.shape[-1] != self.row_bytes(width):
            shown = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise BadInput(f"{self}: rows of {width} weights are {self.row_bytes(width)} bytes; got {shown}")
        return self.block(width).decode_rows(rows)


@dataclass(frozen=True)
class Blocks(WeightEncoding):
    """A block format of GGUF by its name. Only floats of 16 and 32 bits are encoded here; the others come from files."""

    format: str

    def __post_init__(self) -> None:
        block_format(self.format)

    def __str__(self) -> str:
        return self.format

    def block(self, width: int) -> BlockFormat:
        return FORMATS[self.format]

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(self.format)
        if dtype is None:
            raise BadInput(f"{self.format} blocks come from files and are not made here; expected F16, BF16, int8 or int4")
        return integers.finite(weight.to(dtype), str(self)).contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Int8(WeightEncoding):
    """Symmetric signed bytes with an fp16 scale per ``group`` weights of a row; None: per row."""

    group: int | None = 32

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise BadInput(f"{self}: expected a group of at least 1, or of a row")

    def __str__(self) -> str:
        return f"int8(group={'row' if self.group is None else self.group})"

    def block(self, width: int) -> BlockFormat:
        size = self.group or width
        return BlockFormat(str(self), size, 2 + size, scaled_bytes)

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        return integers.by_group(weight, self.block(weight.shape[-1]), integers.encode_int8)


@dataclass(frozen=True)
class Int4(WeightEncoding):
    """Four-bit codes with an fp16 scale and minimum per ``group`` weights of a row."""

    group: int = 32

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise BadInput(f"{self}: expected an even group, two codes make a byte")

    def __str__(self) -> str:
        return f"int4(group={self.group})"

    def block(self, width: int) -> BlockFormat:
        return BlockFormat(str(self), self.group, 4 + self.group // 2, scaled_nibbles)

    def encode(self, weight: torch.Tensor) -> torch.Tensor:
        return integers.by_group(weight, self.block(weight.shape[-1]), integers.encode_int4)


_INTEGERS = re.compile(r"(int8|int4)\(group=([1-9]\d{0,8}|row)\)")


def weight_encoding(text: str) -> WeightEncoding:
    """The encoding that prints as ``text``. Raises BadInput naming those there are."""
    if text in FORMATS:
        return Blocks(text)
    found = _INTEGERS.fullmatch(text)
    if found is None or found[1] == "int4" and found[2] == "row":
        raise BadInput(f"unknown encoding {text!r:.80}; expected int8(group=N or row), int4(group=N), {', '.join(FORMATS)}")
    group = None if found[2] == "row" else int(found[2])
    return Int8(group) if found[1] == "int8" else Int4(group or 0)


#: Channels that share a scale where activations are rounded to integers.
GROUP = 32


def integer_groups(encoding: WeightEncoding | None, width: int | None) -> bool:
    """Whether a row of ``width`` weights is runs of `GROUP` small integers that share their scale (and minimum)."""
    same = encoding in (Int8(GROUP), Int4(GROUP), Int8(None)) or isinstance(encoding, Blocks) and encoding.format in _RUNS
    return same and width is not None and width % GROUP == 0


_RUNS = ("Q4_0", "Q4_1", "Q8_0")

#: Encodings whose bytes are those of a block format.
SAME_BYTES: dict[WeightEncoding, WeightEncoding] = {Int8(32): Blocks("Q8_0"), Int4(32): Blocks("Q4_1")}


@dataclass(frozen=True, eq=False)
class Encoded:
    """An encoded weight at run time: ``rows u8[.., row bytes]``, each of ``width`` weights, which decode to ``dtype``."""

    rows: torch.Tensor
    encoding: WeightEncoding
    width: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows.shape[:-1], self.width)

    def decode(self) -> torch.Tensor:
        """The weight ``[.., width]``."""
        return self.encoding.decode(self.rows, self.width).to(self.dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Decode what ``index`` (an integer or a tensor of them) takes from the first axis."""
        return self.encoding.decode(self.rows[index], self.width).to(self.dtype)


def decoded(weight: torch.Tensor | Encoded) -> torch.Tensor:
    """The values of a weight, encoded or not."""
    return weight.decode() if isinstance(weight, Encoded) else weight
