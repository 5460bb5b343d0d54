"""Ops of the generation program: calls, control flow, and the round on ragged rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import IllegalProgram
from elision.ir.requests import Requests
from elision.ir.states import Array, Journal, Snapshot
from elision.ir.store import ArrayStore
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.ir.types import Axis, Host, Tensor
from elision.ir.value import Builder, Graph
from elision.ir.verify import Request
from tests.ops.harness import T, f32, i64, randn, refused, run

B, D = Axis("b"), Axis("d", draft=True)


def template(name: str, expr: str, inputs: int = 1) -> Graph:
    b = Builder(name)
    return b.build(b.add("map", *(b.input(f"x{i}", f32(T, 3)) for i in range(inputs)), expr=expr))


TARGETS = {"double": template("double", "x0 * 2.0"), "add": template("add", "x0 + x1", 2)}
AT = Tokens.chunk([2, 0, 1], [5, 0, 9])


# --- calls and control flow ---


@pytest.mark.parametrize("condition", [True, False])
def test_when_runs_its_target_or_passes_by(condition: bool) -> None:
    x, y = randn(3, 3), randn(3, 3, seed=1)
    b = Builder("g", TARGETS)
    cond, *values = b.input("c", Tensor((), "bool")), b.input("x", f32(T, 3)), b.input("y", f32(T, 3))
    graph = b.build(b.add("when", cond, *values, target="add"))
    found = run(graph, {"c": torch.tensor(condition), "x": x, "y": y}, {"t": AT}, TARGETS)
    assert torch.equal(found, x + y if condition else x)


@pytest.mark.parametrize("n", [1, 4])
def test_repeat_feeds_results_back_to_the_first_operands(n: int) -> None:
    x, y, b = randn(3, 3), randn(3, 3, seed=1), Builder("g", TARGETS)
    graph = b.build(b.add("repeat", b.input("x", f32(T, 3)), b.input("y", f32(T, 3)), target="add", n=n))
    want = x
    for _ in range(n):
        want = want + y
    assert torch.equal(run(graph, {"x": x, "y": y}, {"t": AT}, TARGETS), want)


def test_call_gives_several_results_on_axes_of_the_caller() -> None:
    """A template that restricts: its new axis becomes one of the caller's, on which the caller goes on."""
    t = Builder("part")
    h = t.input("h", f32(T, 3))
    sel = t.add("last", h, axis="c")
    part = t.build(t.add("restrict", h, sel), sel)
    other = Axis("u")
    b = Builder("g", {"part": part})
    x = b.input("x", f32(other, 3))
    last, index = b.add("call", x, target="part")
    assert str(last.tensor) == "f32[u/c, 3]"
    lifted = b.add("lift", b.add("map", last, expr="x0 * 0.0"), x, index)
    value = randn(3, 3)
    found, where, pos = run(b.build(lifted, index, b.add("positions", last)), {"x": value}, {"u": AT}, {"part": part})
    assert where.tolist() == [1, 2] and pos.tolist() == [6, 9]
    assert torch.equal(found, value * torch.tensor([[1.0], [0.0], [0.0]]))


def test_types_of_calls() -> None:
    b = Builder("g", TARGETS)
    x, y, cond = b.input("x", f32(T, 3)), b.input("y", f32(Axis("u"), 3)), b.input("c", Tensor((), "bool"))
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("call.*no template or entry 'triple'; there are double, add", (x,), {"target": "triple"}),
        ("call.*add takes 2 operands, got 1", (x,), {"target": "add"}),
        ("call.*axis t would be both t and u", (x, y), {"target": "add"}),
        ("when.*expected a condition bool\\[\\]", (x, x), {"target": "double"}),
        ("repeat.*n=0; expected n >= 1", (x,), {"target": "double", "n": 0}),
    ]
    for message, operands, attrs in cases:
        with pytest.raises(ValueError, match=rf"(?s){message}"):
            b.add(message.split(".")[0], *operands, **attrs)
    shrink = Builder("shrink")
    h = shrink.input("h", f32(T, 3))
    b = Builder("g", {"shrink": shrink.build(shrink.add("slice", h, start=0, stop=2))})
    x, cond = b.input("x", f32(T, 3)), b.input("c", Tensor((), "bool"))
    for op, operands, attrs in (("when", (cond, x), {}), ("repeat", (x,), {"n": 2})):
        with pytest.raises(ValueError, match="shrink must give back its first operands' types"):
            b.add(op, *operands, target="shrink", **attrs)


# --- array states over a round ---


def tree_tokens(trees: list[Tree], rows: list[int], positions: list[int], total: int) -> Tokens:
    row, pos, parent, anc = pack(trees, positions)
    return Tokens(torch.tensor(rows)[row], pos, total, parent, anc)


@st.composite
def rounds(draw: Any) -> tuple[list[Tree], list[int], list[list[int]]]:
    """Random trees for rows 0 and 2 of three, and an accepted path of each (row 1 takes no part)."""
    trees = [Tree((-1, *(draw(st.integers(0, i - 1)) for i in range(1, draw(st.integers(1, 6)))))) for _ in range(2)]
    paths = [tree.path(draw(st.integers(0, len(tree.parent) - 1))) for tree in trees]
    return trees, [0, 2], [paths[0], [], paths[1]]


def round_graph(state: Array) -> Graph:
    """Checkpoint, write at every node, commit."""
    b = Builder("round")
    s, x, paths = b.input("S", state), b.input("x", f32(D, 2)), b.input("paths", Host("paths"))
    marked = b.add("checkpoint", s, depth=8)
    return b.build(b.add("commit", b.add("write", marked, x), paths))


@given(rounds())
def test_a_journal_takes_the_value_of_the_last_accepted_node(case: tuple[list[Tree], list[int], list[list[int]]]) -> None:
    trees, rows, paths = case
    store = ArrayStore(Array((2,), "f32", 7.0, Journal(8)), 3)
    for turn in range(2):
        at = tree_tokens(trees, rows, [4, 9], 3)
        x = randn(len(at), 2, seed=turn)
        before = store.read().clone()
        run(round_graph(store.type), {"S": store, "x": x, "paths": paths}, {"d": at})
        first = len(trees[0].parent)
        assert torch.equal(store.read()[0], x[paths[0][-1]]) and torch.equal(store.read()[2], x[first + paths[2][-1]])
        assert torch.equal(store.read()[1], before[1])


@pytest.mark.parametrize("accepted", [[0], []])
def test_a_snapshot_keeps_what_was_accepted_whole_and_undoes_the_rest(accepted: list[int]) -> None:
    store = ArrayStore(Array((2,), "f32", 7.0, Snapshot()), 3)
    at = tree_tokens([Tree((-1,))], [2], [9], 3)
    x = randn(1, 2)
    run(round_graph(store.type), {"S": store, "x": x, "paths": [[], [], accepted]}, {"d": at})
    want = torch.full((3, 2), 7.0)
    if accepted:
        want[2] = x[0]
    assert torch.equal(store.read(), want)


def test_a_state_without_undo_cannot_be_written_in_a_round() -> None:
    store = ArrayStore(Array((2,), "f32"), 1)
    with pytest.raises(IllegalProgram, match=r"error\[retract\].*(?s:.*)Journal"):
        run(
            round_graph(store.type),
            {"S": store, "x": randn(1, 2), "paths": [[0]]},
            {"d": tree_tokens([Tree((-1,))], [0], [0], 1)},
        )


def test_write_of_committed_tokens_and_read_by_row() -> None:
    store, b = ArrayStore(Array((2,), "f32", 7.0), 3), Builder("g")
    state, rows = b.input("S", store.type), b.input("rows", i64(B))
    written = b.add("write", state, b.input("x", f32(T, 2)))
    x = randn(3, 2)
    axes = {"t": AT, "b": Tokens.chunk([1, 1, 1], [0, 0, 0])}
    found = run(b.build(b.add("read", written, rows)), {"S": store, "rows": torch.tensor([2, 1, 0]), "x": x}, axes)
    assert torch.equal(found, torch.stack((x[2], torch.full((2,), 7.0), x[1])))
    refused("expected f32\\[t, 2\\], got f32\\[t, 3\\]", "write", store.type, f32(T, 3))
    refused("depth=0; expected at least 1", "checkpoint", store.type, depth=0)


# --- root, verify, emit ---


def test_root_is_one_node_for_every_row_in_the_call() -> None:
    at = Tokens(torch.tensor([0, 2]), torch.tensor([5, 9]), 3)
    b = Builder("g")
    ids = b.add("root", b.input("last", i64(B)), axis="d")
    found, pos = run(b.build(ids, b.add("positions", ids)), {"last": torch.tensor([11, 13])}, {"b": at})
    assert found.tolist() == [11, 13] and pos.tolist() == [5, 9] and ids.tensor.tokens.drafted
    refused("expected the last tokens i64\\[b\\]", "root", f32(B), axis="d")


@given(rounds(), st.integers(0, 1 << 30))
def test_verify_and_emit_on_rows_of_which_one_is_not_in_the_call(
    case: tuple[list[Tree], list[int], list[list[int]]], seed: int
) -> None:
    """Logits that make every accepted node draw the next one of its path, and the last a token of no child."""
    trees, rows, paths = case
    at = tree_tokens(trees, rows, [4, 9], 3)
    ids = torch.arange(len(at)) + 20  # every node its own token
    logits = torch.zeros(len(at), 64)
    first = [0, 0, len(trees[0].parent)]
    for r in rows:
        for node, after in zip(paths[r], [*paths[r][1:], None], strict=True):
            logits[first[r] + node, 5 + r if after is None else int(ids[first[r] + after])] = 1.0
    past = [torch.arange(5), torch.arange(1), torch.arange(10)]
    requests = Requests([Request(seed=seed)] * 3, past)
    b = Builder("g")
    values = [
        b.input("ids", i64(D)),
        b.input("logits", f32(D, 64)),
        b.input("best", i64(D, 2)),
        b.input("requests", Host("requests")),
        b.input("last", i64(B)),
    ]
    found, nxt = b.add("verify", *values)
    graph = b.build(found, nxt, b.add("emit", values[0], found, nxt), b.add("warp", *values[:2], values[3]))
    best = logits.topk(2).indices
    given_values = {"ids": ids, "logits": logits, "best": best, "requests": requests, "last": torch.tensor([1, 2])}
    axes = {"d": at, "b": Tokens(torch.tensor(rows), torch.tensor([4, 9]), 3)}
    got, drawn, tokens, p = run(graph, given_values, axes)
    assert got == paths and drawn.tolist() == [5, 7]
    assert tokens == [[*(20 + first[r] + node for node in paths[r][1:]), 5 + r] if r != 1 else [] for r in range(3)]
    torch.testing.assert_close(p, logits.softmax(-1))


def test_types_of_verify() -> None:
    C = Axis("c", parent=D)
    host = Host("requests")
    refused("cannot be restricted", "verify", i64(C), f32(C, 9), i64(C, 1), host, i64(B))
    refused("expected one token axis, got draft\\(d\\), t", "verify", i64(D), f32(T, 9), i64(D, 1), host, i64(B))
    refused("expected logits \\[t, vocab\\]", "warp", i64(D), f32(D, 3, 9), host)
