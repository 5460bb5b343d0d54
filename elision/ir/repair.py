"""What makes good the rounding of a block of rows: outliers kept apart, and a matrix of low rank (GEAR, Kang et al. 2024)."""

from __future__ import annotations

import torch

LOOPS = 3  # of the power iteration, as the authors run it
LARGEST = 65504.0  # the largest number of float16


def outliers(blocks: torch.Tensor, axis: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the ``count`` largest and the ``count`` smallest numbers of each vector along ``axis`` are, ``count`` * 2 along it,
    uint8, and the numbers, float16. Of equal ones the first."""
    places = [blocks.argsort(dim=axis, descending=d, stable=True).narrow(axis, 0, count) for d in (True, False)]
    place = torch.cat(places, axis)
    return place.to(torch.uint8), half(blocks.gather(axis, place))


def low_rank(error: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``left [..., n, rank]`` and ``right [..., D, rank]``, float16, whose product ``left right^T`` is close to the best of that
    rank to ``error [..., n, D]``: power iteration from a fixed start."""
    right = start(error.shape[-1], rank, error.dtype).expand(*error.shape[:-2], -1, -1)
    for i in range(LOOPS):
        if i == LOOPS - 1:
            right = torch.linalg.qr(right).Q
        left = error @ right
        if i == LOOPS - 1:
            left = torch.linalg.qr(left).Q
        right = error.transpose(-1, -2) @ left
    return half(left), half(right)


def start(dim: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    """What the iteration begins with, ``[dim, rank]``."""
    return torch.randn(dim, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-LARGEST, LARGEST).half()
