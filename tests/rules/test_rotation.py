"""Rule rotation: renumbered positions, and what renumbering does."""

from __future__ import annotations

import pytest
import torch

from elision.ir.ops.state import select
from elision.ir.states import KV, Dense, Segment
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from tests.rules.cases import cached, evicting, names, ticking


@pytest.mark.parametrize(
    ("rope", "renumber", "legal"), [("on_write", True, False), ("on_read", True, True), ("on_write", False, True)]
)
def test_renumbering_needs_keys_without_rotation(rope: str, renumber: bool, legal: bool) -> None:
    attrs = {"renumber": True} if renumber else {}
    program = ticking(cached(keyed_by="explicit", rope=rope), evicting(**attrs))
    assert names(program) == (set() if legal else {"rotation"})


@pytest.mark.parametrize("renumber", [False, True])
def test_renumbered_positions_are_ranks(renumber: bool) -> None:
    """Of two rows of different lengths one is evicted from; the other keeps its positions; rows appended later come after."""
    store = KVStore(KV(1, 4, 4, (Segment(Dense()),), keyed_by="explicit", rope="on_read"), 2, 12)
    x = torch.randn(9, 1, 4)
    store.append(Tokens.chunk([6, 3], [0, 0]), x, x)
    select(store, torch.tensor([[[0, 4, 5]]]), torch.tensor([0]), renumber=renumber)
    assert store.positions()[:, 0, :4].tolist() == [[0, 1, 2, -1] if renumber else [0, 4, 5, -1], [0, 1, 2, -1]]
    torch.testing.assert_close(store.entries("k", 3)[0, 0], x[[0, 4, 5], 0])
    store.append(Tokens.chunk([1, 0], [6, 0]), x[:1], x[:1])
    assert store.positions()[0, 0, :5].tolist() == [*([0, 1, 2] if renumber else [0, 4, 5]), 6, -1]
