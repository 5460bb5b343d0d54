"""Which cache entries to keep, by brute force; the positions that a cache holds; caches of one call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.ir.mask import Mask
from elision.ir.states import KV, Dense, Float, Segment
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder
from tests.ops.harness import T, f32, i64, randn, refused, run

B, E = Axis("b"), Axis("entries")
CACHE = KV(2, 4, 3, (Segment(Dense(), Float("f32"), Float("f32")),))
KEY, VALUE = f32(T, 2, 4), f32(T, 2, 3)


def keep(score: torch.Tensor, pos: torch.Tensor, **attrs: Any) -> torch.Tensor:
    b = Builder("g")
    kept = b.add("keep", b.input("score", f32(B, 2, E)), b.input("pos", i64(B, 2, E)), **attrs)
    found = run(b.build(kept), {"score": score, "pos": pos}, {"b": Tokens.chunk([1] * len(pos), [0] * len(pos))})
    assert isinstance(found, torch.Tensor)
    return found


def by_hand(score: list[float], pos: list[int], n: int, recent: int, sinks: int) -> list[int]:
    there = [i for i, p in enumerate(pos) if p >= 0]
    newest = max(pos, default=-1)

    def rank(i: int) -> tuple[float, int]:
        protect = pos[i] < sinks or pos[i] > newest - recent
        return (-math.inf if protect else -score[i], pos[i])

    kept = sorted(sorted(there, key=rank)[:n])
    return kept + [-1] * (n - len(kept))


@st.composite
def lists(draw: Any) -> tuple[list[list[float]], list[list[int]]]:
    """Two rows of two heads over six entries: ascending positions, then -1; scores that tie."""
    scores, positions = [], []
    for _ in range(4):
        held = sorted(draw(st.sets(st.integers(0, 12), max_size=6)))
        positions.append(held + [-1] * (6 - len(held)))
        scores.append([draw(st.integers(0, 3)) / 2 for _ in range(6)])
    return scores, positions


@given(lists(), st.integers(0, 3), st.integers(0, 3), st.integers(0, 4))
def test_keep_equals_sorting_by_hand(case: tuple[list[list[float]], list[list[int]]], recent: int, sinks: int, more: int) -> None:
    scores, positions = case
    n = max(1, recent + sinks + more)
    found = keep(torch.tensor(scores).view(2, 2, 6), torch.tensor(positions).view(2, 2, 6), n=n, recent=recent, sinks=sinks)
    want = [by_hand(s, p, n, recent, sinks) for s, p in zip(scores, positions, strict=True)]
    assert found.view(4, n).tolist() == want


def test_keep_by_example() -> None:
    pos = torch.tensor([0, 1, 2, 3, 4, 5, -1]).expand(1, 2, 7)
    score = torch.tensor([0.0, 5.0, 1.0, 5.0, 1.0, 0.0, 9.0]).expand(1, 2, 7)
    assert keep(score, pos, n=3)[0, 0].tolist() == [1, 2, 3]  # 2 and 4 tie: the earlier position stays
    assert keep(score, pos, n=4, recent=1, sinks=1)[0, 0].tolist() == [0, 1, 3, 5]
    assert keep(score, pos, n=8)[0, 0].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert keep(-score, pos, n=1)[0, 0].tolist() == [0]


def test_types_of_keep() -> None:
    refused("n=3 is less than recent=2 \\+ sinks=2", "keep", f32(B, 2, E), i64(B, 2, E), n=3, recent=2, sinks=2)
    refused("expected \\[b, heads, entries\\] twice", "keep", f32(B, 2, E), i64(B, 1, E), n=3)
    refused("expected \\[b, heads, entries\\] twice", "keep", f32(B, E), i64(B, E), n=3)


def test_entries_are_the_positions_in_logical_order() -> None:
    store = KVStore(CACHE, 3, 8, torch.float32)
    at = Tokens.chunk([3, 0, 2], [4, 0, 1])
    store.append(at, randn(5, 2, 4), randn(5, 2, 3))
    b = Builder("g")
    cache, rows = b.input("S", CACHE), b.input("rows", i64(B))
    given_rows = {"S": store, "rows": torch.tensor([2, 0, 1])}
    found = run(b.build(b.add("entries", cache, rows)), given_rows, {"b": Tokens.chunk([1] * 3, [0] * 3)})
    assert found[:, 0, :4].tolist() == [[1, 2, -1, -1], [4, 5, 6, -1], [-1] * 4]
    assert found.shape[1] == 1 and not (found[:, :, 4:] >= 0).any()  # the heads share them
    refused("expected one token axis, got none", "entries", CACHE, i64(3))


@pytest.mark.parametrize("mask", [Mask(), Mask("full"), Mask("window", 2)], ids=str)
def test_fresh_and_an_append_to_empty_hold_the_tokens_of_the_call(mask: Mask) -> None:
    """Attention over both equals torch's, row by row."""
    lengths = [4, 1, 3]
    at = Tokens.chunk(lengths, [0, 7, 2])
    q, k, v = randn(8, 4, 4), randn(8, 2, 4, seed=1), randn(8, 2, 3, seed=2)
    b = Builder("g")
    values = [b.input(n, t) for n, t in (("q", f32(T, 4, 4)), ("k", KEY), ("v", VALUE))]
    fresh = b.add("fresh", *values[1:], type=CACHE)
    filled = b.add("append", b.add("empty", values[0], type=CACHE), *values[1:])
    outputs = [b.add("attend", values[0], s, mask=mask, scale=0.5) for s in (fresh, filled)]
    one, two = run(b.build(*outputs), {"q": q, "k": k, "v": v}, {"t": at})
    assert torch.equal(one, two)
    want = []
    for rows, pos in zip(torch.arange(8).split(lengths), at.pos.split(lengths), strict=True):
        keys, held = (x[rows].repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        seen = mask.visible(pos[:, None], pos[None])
        s = (q[rows].transpose(0, 1) @ keys.mT * 0.5).masked_fill(~seen, -math.inf)
        want.append((s.softmax(-1) @ held).transpose(0, 1))
    torch.testing.assert_close(one, torch.cat(want))


def test_types_of_fresh_and_empty() -> None:
    refused("expected keys \\[t, 2, 4\\], got f32\\[t, 2, 5\\]", "fresh", f32(T, 2, 5), VALUE, type=CACHE)
    refused("expected values \\[t, 2, 3\\], got f32\\[t, 1, 3\\]", "fresh", KEY, f32(T, 1, 3), type=CACHE)
    refused("expected one token axis, got t, u", "fresh", KEY, f32(Axis("u"), 2, 3), type=CACHE)
    refused("expected one token axis, got none", "empty", Tensor((4,), "f32"), type=CACHE)
