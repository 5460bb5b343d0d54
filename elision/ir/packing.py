"""How native code wants weights in memory: panels of rows, so that one vector lane is one output.

A packing is named and invertible; a weight is resident in one form only. ``panel:f32``: a weight ``[N, K]`` as
``[N / 16][K][16]``, rows beyond N zero. Two vectors of 8 outputs lie side by side, and a thread reads its panels as one
sequential stream. """

from __future__ import annotations

from math import prod

import torch

from elision.errors import BadInput

PANEL = 16  # outputs of a panel

_FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def panels(rows: int) -> int:
    """Panels that ``rows`` outputs need."""
    return -(-rows // PANEL)


def panel_bytes(packing: str, k: int) -> int:
    """Bytes of one panel over ``k`` inputs."""
    return k * PANEL * _FLOATS[_format(packing)].itemsize


def packed_bytes(packing: str, shape: tuple[int, ...]) -> int:
    """Bytes of a weight ``[.., N, K]`` in a packing. Raises BadInput for an unknown packing or a weight of one axis."""
    if len(shape) < 2:
        raise BadInput(f"{packing}: a weight of shape {list(shape)}; expected [.., N, K]")
    *lead, n, k = shape
    return prod(lead) * panels(n) * panel_bytes(packing, k)


def pack(weight: torch.Tensor, packing: str) -> torch.Tensor:
    """The bytes (uint8) of a weight ``[.., N, K]`` in a packing; leading axes (experts) stay outermost."""
    dtype = _FLOATS[_format(packing)]
    *lead, n, k = weight.shape
    padded = weight.new_zeros((*lead, panels(n) * PANEL, k), dtype=dtype)
    padded[..., :n, :] = weight
    by_panel = padded.view(*lead, panels(n), PANEL, k).transpose(-1, -2)
    return by_panel.contiguous().view(-1).view(torch.uint8)


def unpack(data: torch.Tensor, packing: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The weight again."""
    *lead, n, k = shape
    found = data.view(_FLOATS[_format(packing)]).view(*lead, panels(n), k, PANEL)
    return found.transpose(-1, -2).reshape(*lead, -1, k)[..., :n, :].to(dtype)


def _format(packing: str) -> str:
    kind, _, format = packing.partition(":")
    if kind != "panel" or format not in _FLOATS:
        raise BadInput(f"unknown packing {packing!r}; expected panel:{', panel:'.join(_FLOATS)}")
    return format
