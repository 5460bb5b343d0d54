"""Token trees: depth, ancestor bits, and the packing of one tree per row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.tree import MAX_NODES, Tree, pack


@st.composite
def trees(draw: st.DrawFn, most: int = MAX_NODES) -> Tree:
    n = draw(st.integers(1, most))
    return Tree((-1, *(draw(st.integers(0, i - 1)) for i in range(1, n))))


@given(trees())
def test_depth_ancestors_and_path_agree_with_the_parents(tree: Tree) -> None:
    for node, (depth, bits) in enumerate(zip(tree.depth, tree.ancestors, strict=True)):
        path, at = [], node
        while at != -1:
            path.append(at)
            at = tree.parent[at]
        assert tree.path(node) == path[::-1]
        assert depth == len(path) - 1
        assert {j for j in range(MAX_NODES) if bits >> j & 1} == set(path)


@given(st.lists(st.tuples(trees(8), st.integers(0, 1000)), min_size=1, max_size=4))
def test_pack_puts_one_tree_after_the_other(rows: list[tuple[Tree, int]]) -> None:
    row, pos, parent, anc = pack([t for t, _ in rows], [p for _, p in rows])
    assert {x.dtype for x in (row, pos, parent, anc)} == {torch.int64}
    for r, (tree, position) in enumerate(rows):
        mine = row == r
        assert parent[mine].tolist() == list(tree.parent)
        assert anc[mine].tolist() == tree.ancestors
        assert pos[mine].tolist() == [position + d for d in tree.depth]
    assert row.tolist() == sorted(row.tolist()) and len(row) == sum(len(t.parent) for t, _ in rows)


def test_the_64th_node_is_the_sign_bit() -> None:
    chain = Tree(tuple(range(-1, MAX_NODES - 1)))
    *_, anc = pack([chain], [0])
    assert chain.ancestors[-1] == (1 << 64) - 1
    assert anc[-1] == -1 and anc[-2] == (1 << 63) - 1
    assert [int(anc[-1]) >> j & 1 for j in range(64)] == [1] * 64


@pytest.mark.parametrize(("parent", "chain"), [((-1,), True), ((-1, 0, 1), True), ((-1, 0, 0), False)])
def test_is_chain(parent: tuple[int, ...], chain: bool) -> None:
    assert Tree(parent).is_chain is chain


@pytest.mark.parametrize(
    "parent",
    [(), (0,), (-1, 1), (-1, -1), (-1, 2, 0), (-1, 0, -2), tuple(range(-1, MAX_NODES))],
    ids=["empty", "no root", "self", "two roots", "later parent", "negative", "65 nodes"],
)
def test_what_is_no_tree_is_refused(parent: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="expected"):
        Tree(parent)
