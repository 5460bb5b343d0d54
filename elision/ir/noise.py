"""Counter-based noise: a function of (seed, row, absolute position, stream) and nothing else.

So equal requests draw equal tokens whatever else is in the batch, and however many tokens a round drafts.
The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key is
the seed; the counter is (token id // 4, position, row, stream), and token id mod 4 picks the word.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class RowKey:
    """Whose noise it is: a request's seed (any integer, taken mod 2^64) and the row within it (mod 2^32)."""

    seed: int
    row: int


def philox(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox4x32 on 32-bit words in uint64: ``counter [4, ...]`` and ``key [2, ...]``, which
    broadcast, to ``[4, ...]``."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3))


def uniform_rows(keys: Sequence[RowKey], positions: Sequence[int], stream: str, n: int) -> torch.Tensor:
    """Float64 ``[m, n]`` in (0, 1), each the middle of one of 2^32 equal intervals: line i is the noise of
    ``keys[i]`` at ``positions[i]`` (mod 2^32) in the stream of that name."""
    blocks = -(-n // 4)
    counter = np.empty((4, len(keys), blocks), dtype=np.uint64)
    counter[0] = np.arange(blocks)
    counter[1] = _column([p & 0xFFFFFFFF for p in positions])
    counter[2] = _column([k.row & 0xFFFFFFFF for k in keys])
    counter[3] = zlib.crc32(stream.encode())
    seeds = _column([k.seed & 0xFFFFFFFFFFFFFFFF for k in keys])
    words = np.moveaxis(philox(counter, np.stack((seeds & _LOW, seeds >> _HALF))), 0, -1)
    return torch.from_numpy((words.reshape(len(keys), -1)[:, :n].astype(np.float64) + 0.5) * 2.0**-32)


def uniform(key: RowKey, position: int, stream: str, n: int) -> torch.Tensor:
    """`uniform_rows` for one key and position: float64 ``[n]``; the first numbers do not depend on ``n``."""
    return uniform_rows([key], [position], stream, n)[0]


def gumbel_rows(keys: Sequence[RowKey], positions: Sequence[int], stream: str, n: int) -> torch.Tensor:
    """Standard Gumbel numbers, float64 ``[m, n]``: the argmax of ``log p + gumbel`` is a draw from p."""
    return -torch.log(-torch.log(uniform_rows(keys, positions, stream, n)))


def gumbel(key: RowKey, position: int, stream: str, n: int) -> torch.Tensor:
    """`gumbel_rows` for one key and position: float64 ``[n]``."""
    return gumbel_rows([key], [position], stream, n)[0]


def _column(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)[:, None]
