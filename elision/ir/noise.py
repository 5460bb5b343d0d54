"""Counter-based noise: a function of (seed, row, absolute position, stream) and nothing else.

So equal requests draw equal tokens whatever else is in the batch, and however many tokens a round drafts.
The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class RowKey:
    """Whose noise it is: a request's seed (any integer, taken mod 2^64) and the row within it."""

    seed: int
    row: int


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32: ``counter uint64[4, n]`` of 32-bit words, ``key`` two 32-bit words, to ``uint64[4, n]``."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3))


def uniform(key: RowKey, position: int, stream: str, n: int) -> torch.Tensor:
    """``n`` float64 numbers in (0, 1), each the middle of one of 2^32 equal intervals."""
    blocks = -(-n // 4)
    counter = np.empty((4, blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = position & 0xFFFFFFFF
    counter[2] = key.row & 0xFFFFFFFF
    counter[3] = zlib.crc32(stream.encode())
    seed = key.seed & 0xFFFFFFFFFFFFFFFF
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).T.reshape(-1)[:n]
    return torch.from_numpy((words.astype(np.float64) + 0.5) * 2.0**-32)


def gumbel(key: RowKey, position: int, stream: str, n: int) -> torch.Tensor:
    """``n`` standard Gumbel numbers, float64: ``argmax(log p + gumbel)`` is a draw from p."""
    return -torch.log(-torch.log(uniform(key, position, stream, n)))
