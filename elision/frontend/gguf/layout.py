"""How llama.cpp's converter rearranges a weight of transformers, as the order that undoes it.

Every function gives ``rows``: row r of the weight of transformers is row ``rows[r]`` of the file, for a weight of ``n`` rows in a
model with ``heads`` query heads and ``kv`` key-value heads. The blocks of a row stay whole, so stored weights follow suit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RowOrder = Callable[[int, int, int], Tensor]


def rotary_queries(n: int, heads: int, kv: int) -> Tensor:
    """The file has the two channels that rotary positions turn together side by side, transformers half a head apart."""
    return torch.arange(n).view(heads, -1, 2).transpose(1, 2).flatten()


def rotary_keys(n: int, heads: int, kv: int) -> Tensor:
    return rotary_queries(n, kv, kv)


def fused_by_head(n: int, heads: int, kv: int) -> Tensor:
    """The file has all queries, all keys, all values; transformers (BLOOM, GPT-NeoX) all three of one head after another."""
    return torch.arange(n).view(3, heads, -1).transpose(0, 1).flatten()


def fused_by_group(n: int, heads: int, kv: int) -> Tensor:
    """Falcon: the queries that share a key, their key and their value, group after group."""
    size = n // (heads + 2 * kv)
    queries, keys, values = torch.arange(n).split((heads * size, kv * size, kv * size))
    return torch.cat((queries.view(kv, -1), keys.view(kv, -1), values.view(kv, -1)), 1).flatten()
