"""Rounding one matrix with error compensation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.ir.weights import Int4, Int8
from elision.passes.weights.compensate import compensated, factor, hessian
from tests.passes.calibrating import generator

ENCODINGS = [Int4(16), Int4(64), Int8(32)]


def correlated(tokens: int, width: int) -> torch.Tensor:
    """Inputs that mostly lie in a few directions, as those of a model do."""
    spread = torch.logspace(0, -2, width)[:, None] * torch.randn(width, width, generator=generator(1))
    return torch.randn(tokens, width, generator=generator(2)) @ spread


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_compensated_errors_are_smaller_than_those_of_rounding(encoding: Int4 | Int8) -> None:
    weight, x = torch.randn(24, 192, generator=generator()), correlated(600, 192)
    rows = compensated(weight, factor(hessian(x), 0.01), encoding)
    assert rows.shape == (24, encoding.row_bytes(192)) and rows.dtype == torch.uint8
    errors = [((encoding.decode(r, 192) - weight) @ x.T).norm() for r in (rows, encoding.encode(weight))]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_numbers_that_can_be_held_come_back(encoding: Int4 | Int8) -> None:
    held = encoding.decode(encoding.encode(torch.randn(16, 128, generator=generator())), 128)
    found = encoding.decode(compensated(held, factor(hessian(correlated(300, 128)), 0.01), encoding), 128)
    assert torch.equal(found, held)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_inputs_without_correlation_leave_nothing_to_make_good(encoding: Int4 | Int8) -> None:
    weight = torch.randn(8, 128, generator=generator())
    for h in (3 * torch.eye(128), torch.zeros(128, 128)):
        assert torch.equal(compensated(weight, factor(h, 0.01), encoding), encoding.encode(weight))


def test_factor_is_the_cholesky_of_the_inverse() -> None:
    h = hessian(correlated(100, 12))
    upper = factor(h, 0.1).double()
    inverse = torch.linalg.inv(h.double() + 0.1 * h.double().diagonal().mean() * torch.eye(12, dtype=torch.double))
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-4, atol=1e-8)
    assert torch.equal(upper, upper.triu())


@given(st.integers(0, 2**31), st.sampled_from([1, 4, 8]))
def test_each_column_is_corrected_as_by_solving_for_the_rest(seed: int, outputs: int) -> None:
    """The definition: after input i is fixed, those after it take the values that minimise |x (w - q)|^2 + damping."""
    encoding, width = Int8(4), 8
    weight = torch.randn(outputs, width, generator=generator(seed)).double()
    x = torch.randn(20, width, generator=generator(seed + 1)).double()
    h = 2 * x.T @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(width, dtype=torch.double)
    left, codes = weight.clone(), torch.zeros_like(weight)
    for i in range(width):
        if i % 4 == 0:
            group = encoding.encode(left[:, i : i + 4].float())
            scale = group[:, :2].contiguous().view(torch.float16).double()[:, 0]
        codes[:, i] = (left[:, i] / scale).round().clamp(-127, 127) * scale
        if i + 1 < width:
            rest = slice(i + 1, width)
            left[:, rest] += torch.linalg.solve(h[rest, rest], h[rest, i : i + 1]).T * (left[:, i] - codes[:, i])[:, None]
    found = encoding.decode(compensated(weight, factor(hessian(x), 0.01), encoding), width)
    assert (found - codes).abs().max() <= 1.01 * scale.max() and (found - codes).abs().gt(1e-4).float().mean() < 0.05  # ties
