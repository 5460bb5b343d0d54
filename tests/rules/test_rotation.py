"""Rule rotation: renumbered positions, and what renumbering does."""

from __future__ import annotations

import pytest
import torch

from elision.ir.ops.state import select
from elision.ir.program import Program
from elision.ir.states import KV, Dense, Segment
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.value import Builder, Value
from tests.rules.cases import cached, evicting, names, template, ticking


def unrotated(program: Program) -> Program:
    """The program with keys as they were before `rope` (there is one key head)."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        return args[0] if v.op == "rope" and v.tensor.axes[1] == 1 else None

    return template(program, "attn", rule)


@pytest.mark.parametrize(("rope", "legal"), [("on_read", False), ("on_write", True)])
def test_keys_are_rotated_once(rope: str, legal: bool) -> None:
    assert names(cached(rope=rope)) == (set() if legal else {"rotation"})
    assert names(unrotated(cached(rope=rope))) == set()


@pytest.mark.parametrize(
    ("rope", "renumber", "legal"), [("on_write", True, False), ("on_read", True, True), ("on_write", False, True)]
)
def test_renumbering_needs_keys_without_rotation(rope: str, renumber: bool, legal: bool) -> None:
    attrs = {"renumber": True} if renumber else {}
    program = ticking(unrotated(cached(keyed_by="explicit", rope=rope)), evicting(**attrs))
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
