"""Opaque operators run between pad and unpad; nothing but plain aten operators on operands and numbers can be said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder
from tests.ops.harness import T, f32, randn, refused, run


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=4).filter(lambda rows: any(n for n, _ in rows))
)
def test_pad_puts_every_row_in_a_line_and_unpad_takes_it_back(rows: list[tuple[int, int]]) -> None:
    lengths = [n for n, _ in rows]
    at = Tokens.chunk(lengths, [start for _, start in rows])
    x = randn(len(at), 2, 3)
    b = Builder("g")
    value = b.input("x", f32(T, 2, 3))
    padded = b.add("pad", value)
    found, back = run(b.build(padded, b.add("unpad", value, padded)), {"x": x}, {"t": at})
    assert found.shape == (len(rows), max(lengths), 2, 3)
    for line, part in zip(found, torch.split(x, lengths), strict=True):
        assert torch.equal(line[: len(part)], part) and not line[len(part) :].any()
    assert torch.equal(back, x)


def test_an_operator_runs_on_the_padded_tensor_with_its_template() -> None:
    at = Tokens.chunk([3, 1], [0, 0])
    x, b = randn(4, 6), Builder("g")
    value = b.input("x", f32(T, 6))
    padded = b.add("pad", value)
    kind = padded.tensor
    summed = b.add("aten", padded, function="cumsum.default", template=(("arg", 0), 1), results=kind)
    both, wide = (("list", ("arg", 0), ("arg", 1)), -1), kind.with_axes(*kind.axes[:2], 12)
    joined = b.add("aten", padded, summed, function="cat.default", template=both, results=wide)
    typed = b.add("aten", summed, function="to.dtype", template=(("arg", 0), ("dtype", "f64")), results=kind.with_dtype("f64"))
    outputs = [b.add("unpad", value, v) for v in (summed, joined, typed)]
    found, longer, doubled = run(b.build(*outputs), {"x": x}, {"t": at})
    want = torch.cat((x[:3].cumsum(0), x[3:]))
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(longer, torch.cat((x, want), -1))
    torch.testing.assert_close(doubled, want.double())


@pytest.mark.parametrize(
    "function",
    [
        "no_such.default",
        "cumsum.no_such",
        "cumsum.__class__",
        "__class__.__init__",
        "os.system",
        "",
        ".",
        "add..Tensor",
        "__name__",
    ],
)
def test_what_is_no_aten_operator_is_refused(function: str) -> None:
    refused("no aten op", "aten", f32(T, 4), function=function, template=(("arg", 0),), results=f32(T, 4))


ILLEGAL = [
    "/tmp/file", ("list", "/tmp/file"), ("file", "/tmp/file"), ("list", ("list", "x")), [1], {}, b"x", (1, 2), (),
    ("arg", 1), ("arg", -1), ("arg",), ("dtype", "f12"),
]  # fmt: skip


@pytest.mark.parametrize("item", ILLEGAL, ids=repr)
def test_a_template_holds_operands_numbers_lists_and_dtypes_only(item: Any) -> None:
    attrs = {"function": "cumsum.default", "results": f32(T, 4)}
    refused("template .* holds something other", "aten", f32(T, 4), template=(item,), **attrs)


def test_types() -> None:
    refused("expected one token axis, got none", "pad", f32(3, 4))
    refused("expected a padded tensor", "unpad", f32(T, 4), f32(T))
    inner = Axis("rows", parent=T)
    assert Builder("g").add("unpad", *_inputs(f32(T, 4), f32(inner, inner, 7))).tensor == f32(T, 7)


def _inputs(*types: Tensor) -> list[Any]:
    b = Builder("g")
    return [b.input(f"x{i}", t) for i, t in enumerate(types)]
