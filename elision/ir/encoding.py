"""Encodings at run time: from rows of numbers to stored codes and back.

``Float``: code = x in that dtype. ``Int``, per group (a run of ``group`` channels of one row, or of ``group``
rows of one channel), with L = 2^(bits-1) - 1:

    symmetric   scale = max|x| / L                  code = round(x / scale)          x' = scale * code
    zero        low = min x                         code = round((x - low) / scale)  x' = low + scale * code
                scale = (max x - low) / (2L + 1)

``scale`` and ``low`` are fp32. Error: |x - x'| <= scale / 2 + 2^-22 max|x| (the second term is fp32
rounding). Codes of four and two bits lie two and four in a byte, the first channel in the lowest bits; symmetric
ones are stored with 2^(bits-1) added.

``Repaired``: x' = the codes' x' + left right^T, with the outliers' own values in their places. Outliers are taken out
before the codes are made (the mean of their vector in their place), and the matrix is made of what the codes leave
(`elision.ir.repair`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from elision.errors import BadInput
from elision.ir import repair
from elision.ir.states import Encoding, Float, Int, Repaired
from elision.ir.types import DTYPES


@dataclass(frozen=True)
class Packed:
    """Encoded rows: ``codes [..., n, width]``, and what lies beside them, ``[..., n / every, *shape]`` (`sides`)."""

    codes: torch.Tensor
    beside: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """An array beside the codes: every so many rows have one item of a shape."""

    every: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def sides(enc: Encoding, dim: int) -> dict[str, Side]:
    """What lies beside the codes of rows of ``dim`` channels: for Int ``scale`` and, with a zero point, ``low``; for Repaired
    ``left`` and ``right``, and ``outlier`` and ``place`` besides."""
    if isinstance(enc, Float):
        return {}
    if isinstance(enc, Repaired):
        found = sides(enc.codes, dim)
        if enc.rank:
            found["left"] = Side(1, (enc.rank,), torch.float16)
            found["right"] = Side(enc.block, (dim, enc.rank), torch.float16)
        if enc.outliers:
            many = 2 * enc.outliers
            every, shape = (enc.block, (many, dim)) if enc.codes.axis == "token" else (1, (many,))
            found["outlier"], found["place"] = Side(every, shape, torch.float16), Side(every, shape, torch.uint8)
        return found
    side = Side(1, (dim // enc.group,), torch.float32) if enc.axis == "channel" else Side(enc.group, (dim,), torch.float32)
    return {"scale": side, "low": side} if enc.zero else {"scale": side}


def check(enc: Encoding, dim: int) -> None:
    """Raises BadInput when rows of ``dim`` channels cannot be stored in this encoding."""
    if isinstance(enc, Float):
        return
    if isinstance(enc, Repaired):
        check(enc.codes, dim)
        length = enc.block if enc.codes.axis == "token" else dim
        if enc.rank > dim or 2 * enc.outliers >= length or dim > 256:
            raise BadInput(
                f"{enc}: expected at most {dim} channels as rank, fewer than {length} outliers in all, and at most 256 channels"
            )
        return
    if enc.axis == "channel" and dim % enc.group:
        raise BadInput(
            f"{enc}: {dim} channels are not a multiple of the group {enc.group}; choose a divisor of {dim}"
        )
    if dim % (8 // enc.bits):
        raise BadInput(f"{enc}: {dim} channels do not fill bytes of {8 // enc.bits} codes; choose 8 bits")


def code_dtype(enc: Encoding) -> torch.dtype:
    if isinstance(enc, Float):
        return DTYPES[enc.dtype]
    if isinstance(enc, Repaired):
        enc = enc.codes
    return torch.int8 if enc.bits == 8 and not enc.zero else torch.uint8


def code_width(enc: Encoding, dim: int) -> int:
    """Stored elements per row."""
    return dim if isinstance(enc, Float) else dim * enc.bits // 8


def encode(rows: torch.Tensor, enc: Encoding) -> Packed:
    """Store ``rows [..., n, D]``. Raises BadInput when n (axis token) or D (axis channel) is not a multiple
    of the group."""
    if isinstance(enc, Float):
        return Packed(rows.to(DTYPES[enc.dtype]))
    check(enc, rows.shape[-1])
    if rows.shape[-2] % enc.token_group:
        raise BadInput(
            f"{enc}: {rows.shape[-2]} rows are not a multiple of the group {enc.token_group}; give whole groups"
        )
    if isinstance(enc, Repaired):
        return _repaired(rows, enc)
    axis = -1 if enc.axis == "channel" else -2
    x = rows if rows.dtype == torch.float64 else rows.float()
    x = torch.unflatten(x, axis, (-1, enc.group))
    limit = 2 ** (enc.bits - 1) - 1
    beside: dict[str, torch.Tensor] = {}
    if enc.zero:
        low = x.amin(axis, keepdim=True).float()
        scale = ((x.amax(axis, keepdim=True) - low) / (2 * limit + 1)).float()
        codes = _divide(x - low, scale).clamp(0, 2 * limit + 1)
        beside["low"] = low.squeeze(axis)
    else:
        scale = (x.abs().amax(axis, keepdim=True) / limit).float()
        codes = _divide(x, scale).clamp(-limit, limit)
    codes = codes.flatten(axis - 1, axis)
    if enc.bits < 8:
        parts = (codes if enc.zero else codes + limit + 1).to(torch.uint8)
        codes = (torch.unflatten(parts, -1, (-1, 8 // enc.bits)) << _shifts(enc)).sum(-1)
    return Packed(codes.to(code_dtype(enc)), {"scale": scale.squeeze(axis), **beside})


def decode(packed: Packed, enc: Encoding, dtype: torch.dtype) -> torch.Tensor:
    """The rows ``[..., n, D]`` in ``dtype``."""
    codes = packed.codes
    if isinstance(enc, Float):
        return codes.to(dtype)
    if isinstance(enc, Repaired):
        return _mended(packed, enc, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if enc.bits < 8:
        codes = ((codes[..., None] >> _shifts(enc)) & (2**enc.bits - 1)).flatten(-2)
    axis = -1 if enc.axis == "channel" else -2
    x = codes.to(wide)
    if enc.bits < 8 and not enc.zero:
        x = x - 2 ** (enc.bits - 1)
    x = torch.unflatten(x, axis, (-1, enc.group)) * packed.beside["scale"].unsqueeze(axis)
    if enc.zero:
        x = x + packed.beside["low"].unsqueeze(axis)
    rows: torch.Tensor = x.flatten(axis - 1, axis).to(dtype)
    return rows


def _repaired(rows: torch.Tensor, enc: Repaired) -> Packed:
    axis = _vectors(enc)
    blocks = torch.unflatten(rows if rows.dtype == torch.float64 else rows.float(), -2, (-1, enc.block))
    beside: dict[str, torch.Tensor] = {}
    dense = blocks
    if enc.outliers:
        place, value = repair.outliers(blocks, axis, enc.outliers)
        dense = blocks.scatter(axis, place.long(), blocks.mean(axis, keepdim=True).expand(value.shape))
        beside = {"outlier": value, "place": place}
    packed = encode(dense.flatten(-3, -2), enc.codes)
    if enc.rank:
        error = dense - torch.unflatten(decode(packed, enc.codes, dense.dtype), -2, (-1, enc.block))
        if enc.outliers:
            error = error.scatter(axis, beside["place"].long(), 0.0)
        beside["left"], beside["right"] = repair.low_rank(error, enc.rank)
    flat = {name: x.flatten(-3, -2) if sides(enc, rows.shape[-1])[name].every == 1 else x for name, x in beside.items()}
    return Packed(packed.codes, {**packed.beside, **flat})


def _mended(packed: Packed, enc: Repaired, dtype: torch.dtype) -> torch.Tensor:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    blocks = torch.unflatten(decode(packed, enc.codes, wide), -2, (-1, enc.block))

    def beside(name: str) -> torch.Tensor:
        x, side = packed.beside[name], sides(enc, blocks.shape[-1])[name]
        return x if side.every > 1 else torch.unflatten(x, -1 - len(side.shape), (-1, enc.block))

    if enc.rank:
        blocks = blocks + beside("left").to(wide) @ beside("right").to(wide).transpose(-1, -2)
    if enc.outliers:
        blocks = blocks.scatter(_vectors(enc), beside("place").long(), beside("outlier").to(wide))
    rows: torch.Tensor = blocks.flatten(-3, -2).to(dtype)
    return rows


def _vectors(enc: Repaired) -> int:
    """The axis of a block ``[..., n, D]`` along which outliers are found."""
    return -2 if enc.codes.axis == "token" else -1


def _divide(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """round(x / scale), 0 where the scale is 0."""
    return torch.where(scale > 0, torch.round(x / torch.where(scale > 0, scale, 1)), 0)


def _shifts(enc: Int) -> torch.Tensor:
    """Where the codes of a byte begin."""
    return torch.arange(0, 8, enc.bits, dtype=torch.uint8)
