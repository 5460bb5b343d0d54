"""Tokens drawn on the device: those that the host draws, given the seed."""

from __future__ import annotations

import zlib

import pytest
import torch

from elision.codegen.triton.sample import sample
from elision.ir.drafted import VERIFY
from elision.ir.verify import Request, draw
from elision.ir.warp import Warp

N = 300
WARPS = [
    Warp(), Warp(0.7), Warp(1.9, top_k=1), Warp(1.3, top_k=40), Warp(top_p=0.5), Warp(0.6, top_k=50, top_p=0.9), Warp(min_p=0.2),
    Warp(1.5, 1000, 0.95, 0.05), Warp(top_p=1e-6),
]  # fmt: skip


@pytest.mark.parametrize("warp,dtype", [*((w, torch.float32) for w in WARPS), (WARPS[5], torch.bfloat16)], ids=repr)
def test_tokens_of_the_host(warp: Warp, dtype: torch.dtype) -> None:
    """Nine tokens of three sequences, the second greedy; seeds beyond 32 and 63 bits."""
    items = [Request(warp, False, 2**63 + 12345, 3), Request(), Request(warp, False, -7, 2**32 + 1)]
    row = torch.arange(9) // 3
    pos = torch.arange(9) * 37 + 5
    logits = (3 * torch.randn(9, N, generator=torch.Generator().manual_seed(1))).to(dtype)
    best, chosen = logits.float().argmax(-1), torch.full((9,), -1)
    numbers = torch.tensor([(0.0 if q.greedy else q.warp.temperature, q.warp.top_p, q.warp.min_p) for q in items])
    signed = [(q.seed + 2**63) % 2**64 - 2**63 for q in items]
    whole = torch.tensor([(q.warp.top_k, s, q.row & 0xFFFFFFFF) for q, s in zip(items, signed, strict=True)])
    stream = zlib.crc32(VERIFY.encode())
    sample[(9,)](chosen, best, logits, row, pos, numbers, whole, N=N, WIDE=1, STREAM=stream, BN=256)
    history = [torch.zeros(int(p) + 1, dtype=torch.int64) for p in pos]
    expected = [draw(x, h, items[r]) for x, h, r in zip(logits, history, row.tolist(), strict=True)]
    assert chosen.tolist() == expected
    assert warp.top_k == 1 or warp.top_p < 1e-3 or len(set(expected)) > 3
