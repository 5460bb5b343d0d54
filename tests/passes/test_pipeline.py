"""Passes as text, their order, the verifier after each, and the clean-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_llama, tiny_scorer

from elision.errors import BadInput, IllegalProgram
from elision.ir.expr import compiled
from elision.ir.fuse import fuse_maps
from elision.ir.layout import row_bytes
from elision.ir.program import Program
from elision.ir.states import KV, Int
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, rewrite
from elision.passes import InsertCache, Pass, SkipLayers, from_text
from elision.passes.pipeline import resolve, run


@given(st.lists(st.integers(0, 40), unique=True).map(lambda x: tuple(sorted(x))), st.sampled_from(["", "attn", "mlp"]))
def test_text_round_trip(layers: tuple[int, ...], half: str) -> None:
    step = SkipLayers(layers, half)
    assert from_text(step.text()) == step


def test_text_form() -> None:
    assert SkipLayers((3, 7, 8, 9)).text() == "skip-layers:layers=3+7-9"
    assert from_text("skip-layers:layers=3+7-9,half=mlp") == SkipLayers((3, 7, 8, 9), "mlp")
    assert SkipLayers().text() == "skip-layers" and from_text("insert-cache:dtype=bf16") == InsertCache("bf16")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("skiplayers", "did you mean 'skip-layers'"),
        ("skip-layers:layer=3", "did you mean 'layers'"),
        ("skip-layers:layers", "expected layers=VALUE"),
        ("skip-layers:layers=x", "numbers such as 3\\+7-9"),
        ("skip-layers:layers=1,layers=2", "given twice"),
        ("", "unknown pass ''"),
    ],
)
def test_bad_text(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        from_text(text)


def test_a_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(BadInput, match="expected a list of passes"):
        resolve("skip-layers:layers=1")
    with pytest.raises(BadInput, match="expected text or a Pass"):
        resolve([3])  # type: ignore[list-item]


@dataclass(frozen=True)
class Early(Pass):
    name: ClassVar[str] = "early"
    family: ClassVar[str] = "test"
    changes: ClassVar[str] = "blocks"
    quality: ClassVar[str] = "exact"

    def apply(self, program: Program) -> None:
        assert program.quality == "exact", "a later pass ran before"


@dataclass(frozen=True)
class Late(Pass):
    name: ClassVar[str] = "late"
    family: ClassVar[str] = "test"
    changes: ClassVar[str] = "round"
    quality: ClassVar[str] = "distribution"

    def apply(self, program: Program) -> None:
        pass


@dataclass(frozen=True)
class Evil(Pass):
    name: ClassVar[str] = "evil"
    family: ClassVar[str] = "test"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        program.states = {n: t for n, t in program.states.items() if n != "kv_0"}


def test_order_is_by_what_passes_change() -> None:
    assert [p.name for p in resolve([Late(), "skip-layers", Early(), "insert-cache"])] == [
        "insert-cache", "skip-layers", "early", "late",
    ]  # fmt: skip
    program, _ = tiny_llama()
    done = run(program, [Late(), Early()])
    assert done.applied[-2:] == ("early", "late") and done.quality == "distribution"
    assert program.quality == "exact", "the pipeline works on a copy"


def test_the_verifier_names_the_pass() -> None:
    program, _ = tiny_llama()
    with pytest.raises(IllegalProgram) as caught:
        run(program, [Late(), Evil(), Early()])
    assert "evil" in caught.value.sides


def test_clean_drops_dead_values_and_merges_equal_ones() -> None:
    b = Builder("g")
    h = b.input("h", Tensor((Axis("t"), 4), "f32"))
    a = b.add("map", h, expr="x0 * 2.0")
    b.add("map", h, expr="exp(x0)")
    again = b.add("map", h, expr="x0 * 2.0")
    graph = rewrite(b.build(b.add("map", a, again, expr="x0 + x1")), lambda b, v, args: None)
    assert [v.attr("expr") for v in graph.values if v.op == "map"] == ["x0 * 2.0", "x0 + x1"]


@given(st.data())
def test_fused_maps_compute_the_same(data: st.DataObject) -> None:
    """Random chains of maps: fewer ops, the same values to the bit."""
    b = Builder("g")
    type = Tensor((Axis("t"), 3), "f64")
    values = [b.input("a", type), b.input("c", type)]
    for _ in range(data.draw(st.integers(2, 7))):
        expr = data.draw(st.sampled_from(["x0 + x1", "x0 * x1", "-x0", "x0 / 3.0", "tanh(x0)", "x0 - x1 * 2.0", "x1"]))
        values.append(b.add("map", *(data.draw(st.sampled_from(values)) for _ in range(2)), expr=expr))
    plain = b.build(values[-1])
    fused = fuse_maps(plain)
    x = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def evaluate(graph: object) -> torch.Tensor:
        seen = dict(zip(graph.inputs, x, strict=True))  # type: ignore[attr-defined]
        for v in graph.values:  # type: ignore[attr-defined]
            if v.op == "map":
                seen[v] = compiled(v.attr("expr"))(*(seen[a] for a in v.args))
        return seen[graph.outputs[0]]  # type: ignore[attr-defined]

    assert torch.equal(evaluate(fused), evaluate(plain))
    live = rewrite(plain, lambda b, v, args: None)
    assert len(fused.values) <= len(live.values)


def test_a_cache_of_bytes() -> None:
    program, _ = tiny_scorer(dtype="f32")
    done = run(program, ["insert-cache:dtype=int8"])
    plain = run(program, ["insert-cache"])
    assert (done.quality, plain.quality) == ("approximate", "exact")
    for name, state in done.states.items():
        before = plain.states[name]
        assert isinstance(state, KV) and isinstance(before, KV)
        assert {s.k for s in state.segments} == {Int(8, "channel", state.dim)}
        assert {s.v for s in state.segments} == {Int(8, "channel", state.vdim)}
        assert row_bytes(state) == state.heads * (state.dim + state.vdim + 8) < row_bytes(before)
    with pytest.raises(BadInput, match="expected a float dtype .* or int8"):
        run(program, ["insert-cache:dtype=int32"])
