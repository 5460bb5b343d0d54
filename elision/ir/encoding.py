"""Encodings at run time: from rows of numbers to stored codes and back.

``Float``: code = x in that dtype. ``Int``, per group (a run of ``group`` channels of one row, or of ``group``
rows of one channel), with L = 127 for 8 bits and 7 for 4 bits:

    symmetric   scale = max|x| / L                  code = round(x / scale)          x' = scale * code
    zero        low = min x                         code = round((x - low) / scale)  x' = low + scale * code
                scale = (max x - low) / (2L + 1)

``scale`` and ``low`` are fp32. Error: |x - x'| <= scale / 2 + 2^-22 max|x| (the second term is fp32
rounding). Four-bit codes lie two in a byte: the even channel in the low nibble; symmetric ones are stored
with 8 added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.errors import BadInput
from elision.ir.states import Encoding, Float
from elision.ir.types import DTYPES


@dataclass(frozen=True)
class Packed:
    """Encoded rows: ``codes [..., n, width]``; for Int ``scale`` and, with a zero point, ``low``, both fp32:
    ``[..., n, D / group]`` grouped by channel, ``[..., n / group, D]`` grouped by token."""

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    low: torch.Tensor | None = None


def check(enc: Encoding, dim: int) -> None:
    """Raises BadInput when rows of ``dim`` channels cannot be stored in this encoding."""
    if isinstance(enc, Float):
        return
    if enc.axis == "channel" and dim % enc.group:
        raise BadInput(
            f"{enc}: {dim} channels are not a multiple of the group {enc.group}; choose a divisor of {dim}"
        )
    if enc.bits == 4 and dim % 2:
        raise BadInput(
            f"{enc}: an odd number of channels, {dim}, cannot be packed two to a byte; choose 8 bits"
        )


def code_dtype(enc: Encoding) -> torch.dtype:
    if isinstance(enc, Float):
        return DTYPES[enc.dtype]
    return torch.int8 if enc.bits == 8 and not enc.zero else torch.uint8


def code_width(enc: Encoding, dim: int) -> int:
    """Stored elements per row."""
    return dim if isinstance(enc, Float) or enc.bits == 8 else dim // 2


def encode(rows: torch.Tensor, enc: Encoding) -> Packed:
    """Store ``rows [..., n, D]``. Raises BadInput when n (axis token) or D (axis channel) is not a multiple
    of the group."""
    if isinstance(enc, Float):
        return Packed(rows.to(DTYPES[enc.dtype]))
    check(enc, rows.shape[-1])
    if rows.shape[-2] % enc.token_group:
        raise BadInput(
            f"{enc}: {rows.shape[-2]} rows are not a multiple of the group {enc.group}; give whole groups"
        )
    axis = -1 if enc.axis == "channel" else -2
    x = rows if rows.dtype == torch.float64 else rows.float()
    x = torch.unflatten(x, axis, (-1, enc.group))
    limit = 127 if enc.bits == 8 else 7
    low = None
    if enc.zero:
        low = x.amin(axis, keepdim=True).float()
        scale = ((x.amax(axis, keepdim=True) - low) / (2 * limit + 1)).float()
        codes = _divide(x - low, scale).clamp(0, 2 * limit + 1)
    else:
        scale = (x.abs().amax(axis, keepdim=True) / limit).float()
        codes = _divide(x, scale).clamp(-limit, limit)
    codes = codes.flatten(axis - 1, axis)
    if enc.bits == 4:
        nibbles = (codes if enc.zero else codes + 8).to(torch.uint8)
        codes = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    return Packed(codes.to(code_dtype(enc)), scale.squeeze(axis), None if low is None else low.squeeze(axis))


def decode(packed: Packed, enc: Encoding, dtype: torch.dtype) -> torch.Tensor:
    """The rows ``[..., n, D]`` in ``dtype``."""
    codes = packed.codes
    if isinstance(enc, Float):
        return codes.to(dtype)
    assert packed.scale is not None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if enc.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    axis = -1 if enc.axis == "channel" else -2
    x = codes.to(wide)
    if enc.bits == 4 and not enc.zero:
        x = x - 8
    x = torch.unflatten(x, axis, (-1, enc.group)) * packed.scale.unsqueeze(axis)
    if packed.low is not None:
        x = x + packed.low.unsqueeze(axis)
    rows: torch.Tensor = x.flatten(axis - 1, axis).to(dtype)
    return rows


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(x / scale), 0 where the scale is 0."""
    return torch.where(scale > 0, torch.round(x / torch.where(scale > 0, scale, 1)), 0)
