"""Ops on the token axis of an image, against torch's convolution and concatenation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Value
from tests.ops.harness import randn, refused, run

B = Axis("b")


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2))
def test_patches_and_a_product_are_a_convolution(rows: int, down: int, across: int, height: int, more: int, width: int) -> None:
    width += 1
    images = randn(rows, 2, down * height + min(more, height - 1), across * width)  # with a rest below
    kernel = randn(5, 2, height, width, seed=1)
    b = Builder("g")
    x = b.input("x", Tensor((B, *images.shape[1:]), "f32"))
    cut = b.add("patches", x, height=height, width=width, axis="p")
    assert isinstance(cut, Value)
    found, pos = run(b.build(cut, b.add("positions", cut)), {"x": images}, {"b": Tokens.chunk([1] * rows, [0] * rows)})
    want = F.conv2d(images, kernel, stride=(height, width)).flatten(2).mT.flatten(0, 1)
    torch.testing.assert_close(found @ kernel.flatten(1).T, want)
    assert pos.tolist() == list(range(down * across)) * rows


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any), st.integers(1, 3))
def test_prepend_puts_tokens_before_every_sequence(lengths: list[int], k: int) -> None:
    at = Tokens.chunk(lengths, [0] * len(lengths))
    x, first = randn(len(at), 3), randn(k, 3, seed=1)
    b = Builder("g")
    tokens, before = b.input("x", Tensor((Axis("t"), 3), "f32")), b.input("first", Tensor((k, 3), "f32"))
    both = b.add("prepend", tokens, before, b.add("extended", tokens, k=k, axis="u"))
    assert isinstance(both, Value)
    found, pos = run(b.build(both, b.add("positions", both)), {"x": x, "first": first}, {"t": at})
    parts = [torch.cat((first, x[at.row == r])) for r, n in enumerate(lengths) if n]
    assert torch.equal(found, torch.cat(parts))
    assert pos.tolist() == [p for n in lengths if n for p in range(n + k)]


@pytest.mark.parametrize("attrs", [{"height": 9, "width": 2}, {"height": 0, "width": 2}])
def test_patches_larger_than_the_image_are_refused(attrs: dict[str, int]) -> None:
    refused("no patch", "patches", Tensor((B, 3, 8, 8), "f32"), axis="p", **attrs)
