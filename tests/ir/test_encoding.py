from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.encoding import code_dtype, code_width, decode, encode
from elision.ir.states import Float, Int

INTS = st.builds(
    Int,
    bits=st.sampled_from([2, 4, 8]),
    axis=st.sampled_from(["channel", "token"]),
    group=st.sampled_from([1, 2, 4, 8]),
    zero=st.booleans(),
)


def rows_of(seed: int, scale: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 3, 16, 8, generator=gen, dtype=torch.float64) * scale + scale).to(dtype)


@given(
    INTS,
    st.integers(0, 99),
    st.sampled_from([1e-6, 1.0, 300.0]),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_error_is_within_half_a_scale(enc: Int, seed: int, scale: float, dtype: torch.dtype) -> None:
    x = rows_of(seed, scale, dtype)
    packed = encode(x, enc)
    assert packed.codes.dtype == code_dtype(enc) and packed.codes.shape == (2, 3, 16, code_width(enc, 8))
    found = packed.beside["scale"]
    assert found.dtype == torch.float32
    assert found.shape == (
        (2, 3, 16, 8 // enc.group) if enc.axis == "channel" else (2, 3, 16 // enc.group, 8)
    )
    axis = 3 if enc.axis == "channel" else 2
    bound = found.repeat_interleave(enc.group, axis).double() / 2 + 2**-22 * x.abs().max()
    assert bool(((x - decode(packed, enc, dtype)).abs() <= bound).all())


@given(INTS, st.integers(0, 99))
def test_scale_spans_the_group(enc: Int, seed: int) -> None:
    """The formula itself: the scale is the largest magnitude (or the range) of the group over the largest
    code."""
    x = rows_of(seed, 1.0)
    groups = x.unflatten(3, (-1, enc.group)) if enc.axis == "channel" else x.unflatten(2, (-1, enc.group))
    axis = 4 if enc.axis == "channel" else 3
    limit = {8: 127, 4: 7, 2: 1}[enc.bits]
    wanted = (
        (groups.amax(axis) - groups.amin(axis)) / (2 * limit + 1)
        if enc.zero
        else groups.abs().amax(axis) / limit
    )
    torch.testing.assert_close(encode(x, enc).beside["scale"], wanted.float(), rtol=1e-5, atol=1e-6)


def test_known_codes() -> None:
    x = torch.tensor([[-7.0, 3.0, 7.0, 0.0]])
    packed = encode(x, Int(4, "channel", 4))
    assert packed.codes.tolist() == [[(-7 + 8) | (3 + 8) << 4, (7 + 8) | (0 + 8) << 4]]
    packed = encode(torch.tensor([[1.0, 1.5, 16.0, 2.0]]), Int(4, "channel", 4, zero=True))
    assert packed.beside["low"].tolist() == [[1.0]]
    assert packed.codes.tolist() == [[0 | 0 << 4, 15 | 1 << 4]]  # round(0.5) is 0, to even
    assert encode(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), Int(2, "channel", 4, zero=True)).codes.tolist() == [[0b11100100]]
    assert encode(torch.tensor([[-1.0, 1.0, 0.0, 1.0]]), Int(2, "channel", 4)).codes.tolist() == [[0b11101101]]
    assert encode(torch.tensor([[-254.0, 2.0]]), Int(8, "channel", 2)).codes.tolist() == [[-127, 1]]


@pytest.mark.parametrize("dtype", ["f64", "f32", "f16", "bf16"])
def test_float_is_a_cast(dtype: str) -> None:
    x = rows_of(0, 1.0)
    enc = Float(dtype)
    assert torch.equal(decode(encode(x, enc), enc, torch.float64), x.to(code_dtype(enc)).double())


@given(INTS)
def test_constant_rows_are_exact(enc: Int) -> None:
    for value in (0.0, 2.0):
        x = torch.full((8, 8), value)
        if value == 0.0 or enc.zero:
            assert torch.equal(decode(encode(x, enc), enc, torch.float32), x)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(BadInput, match="not a multiple of the group 3"):
        encode(torch.zeros(4, 8), Int(8, "channel", 3))
    with pytest.raises(BadInput, match="give whole groups"):
        encode(torch.zeros(5, 8), Int(8, "token", 4))
    with pytest.raises(BadInput, match="do not fill bytes of 2"):
        encode(torch.zeros(4, 7), Int(4, "channel", 7))
