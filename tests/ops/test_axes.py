"""Ops on token axes: identities on random ragged batches; positions and rows travel with every axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Value
from tests.ops.harness import T, f32, i64, randn, refused, run

U = Axis("u")
C = Axis("c", parent=T)


@st.composite
def ragged(draw: Any) -> Tokens:
    """Tokens of one to four rows, some of which have none in this call."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    return Tokens.chunk(lengths, [draw(st.integers(0, 100)) for _ in lengths])


class Call:
    """A graph over one token axis ``t`` with inputs ``x [t, 3]`` and others by name."""

    def __init__(self, at: Tokens, **inputs: torch.Tensor) -> None:
        self.b, self.at = Builder("g"), at
        self.given = {"x": randn(len(at), 3), **inputs}
        kinds = {torch.float32: "f32", torch.int64: "i64", torch.bool: "bool"}
        self.values = {n: self.b.input(n, Tensor((T, *x.shape[1:]), kinds[x.dtype])) for n, x in self.given.items()}

    def __getitem__(self, name: str) -> Value:
        return self.values[name]

    def add(self, op: str, *args: Value, **attrs: Any) -> Any:
        return self.b.add(op, *args, **attrs)

    def run(self, *outputs: Value) -> Any:
        return run(self.b.build(*outputs), self.given, {"t": self.at})


@given(ragged())
def test_last_is_the_last_token_of_every_row_in_the_call(at: Tokens) -> None:
    c = Call(at)
    sel = c.add("last", c["x"], axis="c")
    index, x, pos = c.run(sel, c.add("restrict", c["x"], sel), c.add("positions", sel))
    rows = sorted(set(at.row.tolist()))
    assert index.tolist() == [max(i for i, r in enumerate(at.row.tolist()) if r == row) for row in rows]
    assert torch.equal(x, c.given["x"][index])
    assert pos.tolist() == [int(at.pos[at.row == row].max()) for row in rows]


@given(ragged())
def test_first_is_the_first_token_of_every_row_in_the_call(at: Tokens) -> None:
    c = Call(at)
    sel = c.add("first", c["x"], axis="c")
    index, pos = c.run(sel, c.add("positions", sel))
    rows = sorted(set(at.row.tolist()))
    assert index.tolist() == [min(i for i, r in enumerate(at.row.tolist()) if r == row) for row in rows]
    assert pos.tolist() == [int(at.pos[at.row == row].min()) for row in rows]


@given(ragged(), st.integers(0, 1 << 20))
def test_which_restricts_to_a_mask_and_lift_puts_back(at: Tokens, bits: int) -> None:
    mask = torch.tensor([bool(bits >> i & 1) for i in range(len(at))])
    c = Call(at, mask=mask)
    sel = c.add("which", c["mask"], axis="c")
    part = c.add("restrict", c["x"], sel)
    same = c.add("lift", part, c["x"], sel)
    doubled = c.add("lift", c.add("map", part, expr="x0 * 2.0"), c["x"], sel)
    x, pos, found, twice = c.run(part, c.add("positions", part), same, doubled)
    assert torch.equal(x, c.given["x"][mask]) and torch.equal(pos, at.pos[mask])
    assert torch.equal(found, c.given["x"])
    assert torch.equal(twice, torch.where(mask[:, None], 2 * c.given["x"], c.given["x"]))


@given(ragged(), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_selections_nest(at: Tokens, first: int, second: int) -> None:
    """A selection of a selection: the axes nest, and a norm of what is left equals what is left of the norm."""
    n = len(at)
    one = torch.tensor([bool(first >> i & 1) for i in range(n)])
    two = torch.tensor([bool(second >> i & 1) for i in range(n)])
    c = Call(at, one=one, two=two)
    outer = c.add("which", c["one"], axis="c")
    inner = c.add("which", c.add("restrict", c["two"], outer), axis="d")
    part = c.add("restrict", c.add("restrict", c["x"], outer), inner)
    normed = c.add("norm", part, kind="rms", eps=1e-6)
    whole = c.add("norm", c["x"], kind="rms", eps=1e-6)
    x, pos, low, high = c.run(part, c.add("positions", part), normed, whole)
    assert str(part.tensor.tokens) == "t/c/d"
    assert torch.equal(x, c.given["x"][one & two]) and torch.equal(pos, at.pos[one & two])
    assert torch.equal(low, high[one & two])


@st.composite
def assigned(draw: Any) -> tuple[Tokens, torch.Tensor]:
    """Ragged tokens, each with the token of its row that it joins (one that names itself)."""
    at = draw(ragged())
    assign: list[int] = []
    for i, row in enumerate(at.row.tolist()):
        kept = [j for j in range(i) if int(at.row[j]) == row and assign[j] == j]
        assign.append(draw(st.sampled_from([i, *kept])))
    return at, torch.tensor(assign)


@given(assigned())
def test_merge_is_the_weighted_mean_of_every_cluster(case: tuple[Tokens, torch.Tensor]) -> None:
    at, assign = case
    weight = randn(len(at), seed=3).abs() + 0.1
    c = Call(at, assign=assign, weight=weight)
    kept = c.add("clusters", c["assign"], axis="c")
    merged = c.add("merge", c["x"], c["assign"], c["weight"], kept)
    back = c.add("unmerge", merged, c["assign"], kept)
    index, x, pos, wide = c.run(kept, merged, c.add("positions", merged), back)
    assert index.tolist() == [i for i, a in enumerate(assign.tolist()) if a == i]
    for place, i in enumerate(index.tolist()):
        members = assign == i
        want = (weight[members, None] * c.given["x"][members]).sum(0) / weight[members].sum()
        torch.testing.assert_close(x[place], want)
        assert torch.equal(wide[members], x[place].expand(int(members.sum()), 3))
    assert torch.equal(pos, at.pos[index])


@given(ragged())
def test_merging_nothing_changes_nothing(at: Tokens) -> None:
    c = Call(at, assign=torch.arange(len(at)), weight=torch.ones(len(at)))
    kept = c.add("clusters", c["assign"], axis="c")
    merged = c.add("merge", c["x"], c["assign"], c["weight"], kept)
    x, back = c.run(merged, c.add("unmerge", merged, c["assign"], kept))
    assert torch.equal(x, c.given["x"]) and torch.equal(back, c.given["x"])


@given(ragged(), st.data())
def test_rope_after_restrict_is_restrict_after_rope(at: Tokens, data: st.DataObject) -> None:
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(at), max_size=len(at))))
    c = Call(at, mask=mask, heads=randn(len(at), 2, 4, seed=2))
    freq = c.b.input("freq", f32(2))
    c.given["freq"] = torch.tensor([1.0, 0.01])
    sel = c.add("which", c["mask"], axis="c")
    one = c.add("rope", c.add("restrict", c["heads"], sel), freq, style="half")
    two = c.add("restrict", c.add("rope", c["heads"], freq, style="half"), sel)
    found, want = c.run(one, two)
    assert torch.equal(found, want)


def test_types_of_axes() -> None:
    refused("selects from t, not from the axis of f32\\[u, 4\\]", "restrict", f32(U, 4), i64(C))
    refused("expected a selection", "restrict", f32(T, 4), f32(C))
    refused("expected a selection", "restrict", f32(T, 4), i64(4))
    refused("selects from None", "restrict", f32(T, 4), i64(T))
    refused("expected bool\\[t\\]", "which", f32(T), axis="c")
    refused("axis='1c' is not a name", "last", f32(T, 4), axis="1c")
    refused("expected one token axis, got none", "last", f32(4), axis="c")
    refused("cannot lift f32\\[t/c, 5\\]", "lift", f32(C, 5), f32(T, 4), i64(C))
    refused("cannot lift f32\\[t, 4\\]", "lift", f32(T, 4), f32(T, 4), i64(C))
    refused("expected i64\\[t\\]", "clusters", f32(T), axis="c")
    refused("expected a weight f32\\[t\\]", "merge", f32(T, 4), i64(T), f32(T, 4), i64(C))
    refused("expected one token axis, got t, u", "merge", f32(T, 4), i64(U), f32(T), i64(C))
    refused("does not come from u", "merge", f32(U, 4), i64(U), f32(U), i64(C))
    refused("is not on the axis of", "unmerge", f32(T, 4), i64(T), i64(C))


@pytest.mark.parametrize("op", ["map", "matmul", "concat"])
def test_two_token_axes_never_mix(op: str) -> None:
    attrs = {"expr": "x0 + x1"} if op == "map" else {}
    for other in (U, C, Axis("t", draft=True)):
        refused("", op, f32(T, 4, 4), f32(other, 4, 4), **attrs)
