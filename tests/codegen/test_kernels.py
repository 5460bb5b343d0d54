"""Every CPU kernel against the body of its op: shapes, broadcasts, gaps, threads, few tokens and many."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench import Bench, Maker, T
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import stored

from elision.codegen.cpu.emitters import _RULES, Emitter
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.planner import Planner
from elision.codegen.refusal import NotNative
from elision.codegen.regions import Products
from elision.ir.expr import FUNCTIONS, canonical
from elision.ir.tokens import Tokens
from elision.ir.types import Tensor
from elision.ir.value import Graph, Value
from elision.ir.weights import weight_encoding
from elision.llvm.processor import host_level

#: Examples of a test: each compiles many cases.
FEW = settings(max_examples=max(1, settings.default.max_examples // 12))  # type: ignore[union-attr]
Case = Callable[[Maker], tuple[Value, ...]]
Cases = st.SearchStrategy[Case]
sizes = st.sampled_from([1, 3, 8, 15, 16, 17, 24, 40])
TOKENS = Tokens.chunk([5, 0, 9, 1], [0, 3, 70, 2])


def check(
    cases: list[Case], at: Tokens = TOKENS, tolerance: float = 2e-5, spread: float = 1.0, hosts: set[str] | None = None
) -> None:
    bench = Bench()
    for case in cases:
        bench.add(case)
    bench.compile(hosts)
    bench.check(at, tolerance, spread)
    if len(at) > 1:
        bench.check(Tokens.chunk([1], [12]), tolerance, spread)  # a smaller call on the same tables


@st.composite
def linears(draw: st.DrawFn) -> Case:
    width, out, biased = draw(sizes), draw(sizes), draw(st.booleans())
    kind = draw(st.sampled_from(["plain", "gate", "residual", "row"]))

    def make(m: Maker) -> tuple[Value, ...]:
        x = m.x(width)
        bias = (m.weight("b", out),) if biased else ()
        y = m("linear", x, m.weight("w", out, width), *bias)
        if kind == "gate":
            y = m("map", y, m("linear", x, m.weight("u", out, width)), expr="silu(x0) * x1")
        elif kind == "residual":
            y = m("map", m.x(out), y, expr="x0 + 0.5 * x1")
        elif kind == "row":
            y = m("map", y, m.weight("r", out), expr="tanh(x0) * x1")
        return (y,)

    return make


@st.composite
def splits(draw: st.DrawFn) -> Case:
    width, parts = draw(sizes), draw(st.lists(sizes, min_size=2, max_size=3))

    def make(m: Maker) -> tuple[Value, ...]:
        found = m("linear", m.x(width), m.weight("w", sum(parts), width), splits=tuple(parts))
        return tuple(m("map", part, expr="x0 * 2.0") for part in found)  # type: ignore[attr-defined]

    return make


@st.composite
def norms(draw: st.DrawFn) -> Case:
    size, heads = draw(sizes.filter(lambda n: n > 1)), draw(st.sampled_from([0, 1, 3]))
    kind = draw(st.sampled_from(["rms", "layer", "l2"]))
    weights, per_head, offset = draw(st.integers(0, 2)), draw(st.booleans()), draw(st.sampled_from([0.0, 1.0]))

    def make(m: Maker) -> tuple[Value, ...]:
        shape = (heads, size) if heads else (size,)
        own = shape if per_head else (size,)
        more = [m.weight(f"w{i}", *own) for i in range(weights)]
        return (m("norm", m.x(*shape), *more, kind=kind, eps=1e-5, offset=offset),)

    return make


@st.composite
def ropes(draw: st.DrawFn) -> Case:
    half, rest, heads = draw(st.sampled_from([1, 2, 8, 12, 16])), draw(st.sampled_from([0, 1, 8])), draw(st.integers(1, 3))
    style, scale, gap = draw(st.sampled_from(["half", "interleaved"])), draw(st.sampled_from([1.0, 1.3])), draw(st.booleans())

    def make(m: Maker) -> tuple[Value, ...]:
        width = 2 * half + rest
        x = m.x(heads, width + (3 if gap else 0))
        x = m("slice", x, start=2, stop=2 + width) if gap else x
        return (m("rope", x, m.weight("f", half), style=style, scale=scale),)

    return make


@st.composite
def maps(draw: st.DrawFn) -> Case:
    outer, width = draw(st.sampled_from([1, 3])), draw(sizes)
    shapes = [(outer, width), (width,), (outer, 1), (1, width), (1,)]
    first, others = (outer, width), draw(st.lists(st.sampled_from(shapes), min_size=1, max_size=3))
    kinds = draw(st.lists(st.booleans(), min_size=len(others), max_size=len(others)))

    def make(m: Maker) -> tuple[Value, ...]:
        values = [m.x(*first)]
        for i, (shape, weight) in enumerate(zip(others, kinds, strict=True)):
            whole = weight or len(shape) == 2  # tokens broadcast over the right: all their features are given
            values.append(m.weight(f"w{i}", *shape) if weight else m.x(*(shape if whole else (1, *shape))))
        expr = " + ".join(f"x{i} * {i + 1}.5" for i in range(len(values)))
        return (m("map", *values, expr=canonical(expr)),)

    return make


@st.composite
def reductions(draw: st.DrawFn) -> Case:
    size, heads, kind = draw(sizes), draw(st.sampled_from([0, 1, 3])), draw(st.sampled_from(["sum", "mean", "max"]))
    keepdim = draw(st.booleans())

    def make(m: Maker) -> tuple[Value, ...]:
        x = m.x(heads, size) if heads else m.x(size)
        found = m("reduce", x, kind=kind, keepdim=keepdim)
        return (m("map", x, found, expr="x0 - x1") if keepdim else found,)

    return make


@st.composite
def moves(draw: st.DrawFn) -> Case:
    heads, width = draw(st.integers(1, 3)), draw(st.sampled_from([2, 8, 17]))
    cut = draw(st.integers(1, width - 1))
    kind = draw(st.sampled_from(["halves", "flat", "heads"]))

    def make(m: Maker) -> tuple[Value, ...]:
        x = m("view", m.x(heads * width), shape=(heads, width))
        a, b = m("slice", x, start=0, stop=cut), m("slice", x, start=cut, stop=width)
        if kind == "halves":
            return (m("concat", b, a),)
        if kind == "heads":
            return (m("concat", m("map", b, expr="-x0"), a),)
        flat = m("view", m("concat", b, a), shape=(heads * width,))
        return (m("linear", flat, m.weight("w", 5, heads * width)),)

    return make


OPS = [linears(), splits(), norms(), ropes(), maps(), moves(), reductions()]


@pytest.mark.parametrize("cases", OPS, ids=["linear", "splits", "norm", "rope", "map", "move", "reduce"])
def test_kernels(cases: Cases) -> None:
    @FEW
    @given(st.lists(cases, min_size=8, max_size=8))
    def run(found: list[Case]) -> None:
        check(found)

    run()


def expression(expr: str, operands: int) -> Case:
    return lambda m: (m("map", *(m.x(19) for _ in range(operands)), expr=canonical(expr)),)


EXPRESSIONS = {name: f"{name}(x0)" for name in FUNCTIONS if name not in ("where", "minimum", "maximum")}
EXPRESSIONS |= {
    "minimum": "minimum(x0, x1)", "maximum": "maximum(x0, 0.5)", "where": "where(x0 < x1, x0, x1 * 2.0)", "square": "x0 ** 2",
    "cube": "x0 ** 3", "inverse": "(x0 ** 2 + 1.0) ** -1", "root": "(x0 ** 2) ** 0.5", "rroot": "(x0 ** 2 + 1.0) ** -0.5",
    "log": "log(x0 ** 2 + 0.001)", "log1p": "log1p(x0 ** 2)", "sqrt": "sqrt(x0 ** 2)", "rsqrt": "rsqrt(x0 ** 2 + 0.01)",
    "constant": "1.0 / (2.0 - x0 ** 2 * -1.0)", "negative": "-x0 - -2.0", "eq": "where(x0 == x0, x1, x0)",
}  # fmt: skip


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_every_function(spread: float) -> None:
    check([expression(e, 2) for e in EXPRESSIONS.values()], tolerance=2e-4 if spread > 3 else 2e-5, spread=spread)


def test_embedding_and_last_tokens() -> None:
    def embed(m: Maker) -> tuple[Value, ...]:
        return (m("embed", m.x(dtype="i64"), m.weight("table", 100, 21)),)

    def last(m: Maker) -> tuple[Value, ...]:
        x = m("map", m.x(13), expr="x0 * 2.0")
        return (m("restrict", x, m("last", x, axis="last")),)

    check([embed])
    check([last], hosts={"last"})


@st.composite
def mixtures(draw: st.DrawFn) -> Case:
    count, k, width = draw(st.sampled_from([2, 4, 9, 12])), draw(st.integers(1, 2)), draw(sizes)
    grouped = {"groups": 3, "top_groups": draw(st.integers(1, 2)), "group_best": draw(st.integers(1, 3))} if count > 4 else {}
    grouped |= draw(st.sampled_from([{}, {"scale": 2.5, "eps": 1e-20}]))
    corrected = draw(st.booleans())
    inner, kind, renormalise = draw(st.sampled_from([16, 32])), draw(st.sampled_from(["softmax", "sigmoid"])), draw(st.booleans())
    biased, halves, weighted = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from(["input", "output"]))
    out = draw(st.sampled_from([16, 48] if biased else [5, 16, 40]))
    expr = draw(st.sampled_from(["silu(x0) * x1", "gelu(x0)"]))

    def make(m: Maker) -> tuple[Value, ...]:
        x, parts = m("map", m.x(width), expr="x0 * 1.5"), 2 if "x1" in expr else 1
        choosing = [m.weight("choose", count)] if corrected else []
        weight, index = m("route", m.x(count), *choosing, k=k, kind=kind, renormalise=renormalise, **grouped)  # type: ignore[misc]
        biases = [m.weight("bu", count, parts * inner), m.weight("bd", count, out)] if biased else []
        up, down = m.weight("up", count, parts * inner, width), m.weight("down", count, out, inner)
        y = m("experts", x, weight, index, up, down, *biases, expr=expr, halves=halves, weighted=weighted)
        return m("map", y, expr="x0 + 1.0"), weight, index

    return make


@FEW
@given(st.lists(mixtures(), min_size=6, max_size=6))
def test_experts(cases: list[Case]) -> None:
    check(cases)


def encoded_mixture(format: str, k: int, count: int, halves: bool, weighted: str) -> Case:
    width, inner, out = 256, 256, 40

    def weight(m: Maker, name: str, n: int, k: int) -> Value:
        rows = torch.stack([stored(format, n, k).roll(i, 0) for i in range(count)])
        return m.weight(name, count, n, k, rows=(weight_encoding(format), rows))

    def make(m: Maker) -> tuple[Value, ...]:
        gates, index = m("route", m.x(count), k=k)  # type: ignore[misc]
        up, down = weight(m, "up", 2 * inner, width), weight(m, "down", out, inner)
        x = m("map", m.x(width), expr="x0 * 0.01")
        return (m("experts", x, gates, index, up, down, expr="sigmoid(x0) * x1", halves=halves, weighted=weighted),)

    return make


FORMATS = ["int8(group=32)", "int8(group=row)", "int4(group=32)", "BF16", "Q8_0", "Q4_1", "Q6_K", "Q4_K"]


@pytest.mark.parametrize("format", FORMATS)
def test_encoded_experts(format: str) -> None:
    """Few tokens of each expert, which are multiplied as they are decoded, and many, for which panels are decoded first."""
    cases = [encoded_mixture(format, 2, 5, True, "output"), encoded_mixture(format, 1, 2, False, "input")]
    check(cases, Tokens.chunk([50, 0, 7], [0, 3, 70]), 5e-5)


def test_routing_ties_go_to_the_smaller_index() -> None:
    check([lambda m: m("route", m("map", m.x(6), expr="floor(x0)"), k=4)])  # type: ignore[arg-type,return-value]


def test_numbers_by_position_begin_on_the_host_and_go_on_natively() -> None:
    def numbers(m: Maker) -> tuple[Value, ...]:
        x = m("map", m.x(9), expr="x0 * 2.0")
        scale = m("map", m("map", m("positions", x), expr="x0", dtype="f32"), expr="log1p(floor(x0 / 4.0)) + 1.0")
        return (m("map", x, m("view", scale, shape=(1,)), expr="x0 * x1"),)

    check([numbers], hosts={"map", "positions"})


@pytest.mark.parametrize("op", [*_RULES, "linear"])
def test_an_attribute_that_no_kernel_knows_goes_to_the_host(op: str) -> None:
    made = Value(op, (), (("unheard_of", 1),), Tensor((T, 8), "f32"))
    region = Products(made, made, (), "x0", ()) if op == "linear" else made
    with pytest.raises(NotNative, match="unheard_of"):
        Emitter(Kernels(), host_level())(Planner(Graph("g", (), (made,), ()), False, {}.__getitem__), region)
