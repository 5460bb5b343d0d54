"""Scalar expressions: every function against torch, one spelling each, and nothing outside the closed set."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.expr import FUNCTIONS, canonical, compiled, flops, number, operands
from tests.ops.harness import T, Weight, apply, f32, randn, refused

X, Y = randn(5, 7, seed=1), randn(5, 7, seed=2)

CASES = {
    "x0 + x1": X + Y,
    "x0 - x1 * 2.5": X - Y * 2.5,
    "-x0 / x1": -X / Y,
    "x0 % 0.5": X % 0.5,
    "x0 ** 3": X**3,
    "exp(x0)": X.exp(),
    "log(abs(x0))": X.abs().log(),
    "log1p(abs(x0))": torch.log1p(X.abs()),
    "sqrt(abs(x0))": X.abs().sqrt(),
    "rsqrt(abs(x0) + 1e-06)": torch.rsqrt(X.abs() + 1e-6),
    "tanh(x0 / 30.0) * 30.0": torch.tanh(X / 30) * 30,
    "erf(x0)": X.erf(),
    "sin(x0) + cos(x1)": X.sin() + Y.cos(),
    "floor(x0)": X.floor(),
    "sigmoid(x0)": X.sigmoid(),
    "relu(x0)": X.relu(),
    "silu(x0) * x1": F.silu(X) * Y,
    "gelu(x0)": F.gelu(X),
    "gelu_tanh(x0)": F.gelu(X, approximate="tanh"),
    "softplus(x0)": F.softplus(X),
    "minimum(x0, x1)": torch.minimum(X, Y),
    "maximum(x0, -0.1)": X.clamp(min=-0.1),
    "minimum(x0, 0.1)": X.clamp(max=0.1),
    "where(x0 < x1, x0, x1)": torch.minimum(X, Y),
    "where(x0 >= 0, x1, 0.0)": torch.where(X >= 0, Y, 0.0),
}


@pytest.mark.parametrize("text", CASES)
def test_expressions_equal_torch(text: str) -> None:
    assert canonical(text) == text
    assert torch.equal(apply("map", X, Y, expr=text), CASES[text])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_expressions_are_computed_in_their_operands_dtype(dtype: torch.dtype) -> None:
    x, y = X.to(dtype), Y.to(dtype)
    assert torch.equal(apply("map", x, y, expr="silu(x0) * x1 + 0.1"), F.silu(x) * y + 0.1)


@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "==", "!="])
def test_comparisons(op: str) -> None:
    x, y = X.round(), Y.round()
    want = {"<": x < y, "<=": x <= y, ">": x > y, ">=": x >= y, "==": x == y, "!=": x != y}[op]
    assert torch.equal(apply("map", x, y, expr=f"x0 {op} x1", dtype="bool"), want)


def test_every_function_is_tried_here() -> None:
    assert {name for name in FUNCTIONS if not any(f"{name}(" in text for text in CASES)} == set()


def test_operands_broadcast_on_the_right_and_cast() -> None:
    w, gate = randn(7, seed=3), randn(5, 1, seed=4)
    assert torch.equal(apply("map", X, Weight(w), gate, expr="x0 * x1 + x2"), X * w + gate)
    assert torch.equal(apply("map", X, expr="x0", dtype="bf16"), X.bfloat16())
    assert torch.equal(apply("map", X, Y.double(), expr="x0 + x1", dtype="f32"), (X + Y.double()).float())


leaves = st.sampled_from(["x0", "x1", "x2"])
deeper = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "**"]), inner),
        st.builds("({} * {!r})".format, inner, st.floats(-1e6, 1e6)),
        st.builds("-{}".format, inner),
        st.builds("{}({})".format, st.sampled_from(["silu", "tanh", "exp"]), inner),
        st.builds("where({} > {}, {}, {})".format, inner, inner, inner, inner),
    ),
    max_leaves=12,
)


@given(deeper)
def test_the_one_spelling_is_a_fixed_point_with_the_same_value(text: str) -> None:
    one = canonical(text)
    assert canonical(one) == one and operands(one) == operands(text) and flops(one) == flops(text)
    x = [randn(4, seed=i, dtype=torch.float64) for i in range(3)]
    want = eval(text, {**FUNCTIONS, "x0": x[0], "x1": x[1], "x2": x[2]})  # the text is Python: an oracle, for tests only
    torch.testing.assert_close(compiled(one)(*x), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "x0.__class__", "x0.exp()", "x0[0]", "(lambda: x0)()", "[x0]", "{x0}",
        "x0 if x1 else x0", "x0 and x1", "not x0", "~x0", "+x0", "x0 @ x1", "x0 // x1", "x0 << 2", "x0 & x1", "f'{x0}'",
        "'a' * x0", "x0 * 1j", "x0 * True", "x0 * None", "x0 * ...", "(y := x0)", "x0 = 1", "x0; x1", "exp(*x0)",
        "exp(x=x0)", "exp(x0, x1)", "silu(x0, x1)", "softplus(x0, 2)", "where(x0, x1)", "exp()", "exp", "silu + x0",
        "exp(exp)", "eval(x0)", "open(x0)", "x", "y0", "x-1", "x00", "x01", "X0", "x0x", "_", "0 < x0 < 1", "1e999 * x0",
        "x0 + inf", "x0 + nan", "", " ", "(", "2.0", "1 + 1", "2 ** x0 ** 9 ** 9 ** 9 ** 9", "x0 * (1 / 0)", "exp(2.0)",
        "minimum(1.0, x0)", "x0 is x1", "x0 in x1", "yield x0", "await x0", "x0\x00", "9" * 400 + " * x0",
        "9" * 5000 + "* x0", "-" * 101 + "x0", "+".join(["x0"] * 102), "-" * 100_000 + "x0", "(" * 500 + "x0" + ")" * 500,
        "+".join(["x0"] * 5000),
    ],
)  # fmt: skip
def test_hostile_expressions_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="map: "):
        canonical(text)
    refused("map: ", "map", f32(T, 4), f32(T, 4), expr=text)


def test_the_type_rule_refuses() -> None:
    refused("'x0\\+x1' is not canonical; write 'x0 \\+ x1'", "map", f32(T, 4), f32(T, 4), expr="x0+x1")
    refused("reads more than 1 operands", "map", f32(T, 4), expr="x0 + x1")
    refused("cannot broadcast", "map", f32(T, 4), f32(T, 5), expr="x0 + x1")
    refused("need dtype=", "map", f32(T, 4), f32(T, 4).with_dtype("f64"), expr="x0 + x1")
    refused("unknown dtype", "map", f32(T, 4), expr="x0", dtype="f12")


def test_numbers_are_finite() -> None:
    assert number(0.1) == "0.1"
    for value in (math.inf, -math.inf, math.nan):
        with pytest.raises(BadInput, match="not finite"):
            number(value)
