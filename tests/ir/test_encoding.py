from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.encoding import code_dtype, code_width, decode, encode
from elision.ir.repair import low_rank
from elision.ir.states import Float, Int, Repaired

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


def repaired(axis: str = "token", bits: int = 2, rank: int = 2, outliers: int = 1) -> Repaired:
    return Repaired(Int(bits, axis, 32 if axis == "token" else 16, zero=True), 32, rank, outliers)


def error(x: torch.Tensor, enc: Repaired | Int) -> float:
    return float((x - decode(encode(x, enc), enc, torch.float64)).norm())


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_a_repair_in_formulas(axis: str) -> None:
    """Outliers are exact to float16, the rest is codes and a matrix, close to the best one, of what the codes leave."""
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    enc, blocks, along = repaired(axis), x.view(2, 2, 32, 16), 2 if axis == "token" else 3
    packed = encode(x, enc)
    is_outlier = (blocks == blocks.amax(along, keepdim=True)) | (blocks == blocks.amin(along, keepdim=True))
    dense = torch.where(is_outlier, blocks.mean(along, keepdim=True), blocks)
    left = torch.where(is_outlier, 0, dense - decode(encode(dense.flatten(1, 2), enc.codes), enc.codes, x.dtype).view_as(dense))
    best = torch.linalg.svdvals(left)[..., enc.rank :].norm(dim=-1)
    found = (decode(packed, enc, x.dtype).view_as(blocks) - blocks) * ~is_outlier
    assert bool((found.flatten(2).norm(dim=-1) <= 1.1 * best).all())
    got = decode(packed, enc, x.dtype).view_as(blocks)[is_outlier]
    assert torch.equal(got, blocks[is_outlier].half().double())
    assert is_outlier.sum(along).unique().tolist() == [2]
    assert {n: a.shape[2:] for n, a in packed.beside.items()}["right"] == (16, 2)


def test_the_matrix_is_within_5_percent_of_the_best() -> None:
    """Even of numbers without any structure."""
    x = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(2))
    left, right = low_rank(x, 2)
    best = torch.linalg.svdvals(x)[:, 2:].norm(dim=-1)
    assert bool(((x - left.float() @ right.float().mT).norm(dim=(1, 2)) <= 1.05 * best).all())


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_more_repair_is_less_error(axis: str) -> None:
    x = rows_of(3, 1.0).flatten(0, 2).repeat(1, 2).view(-1, 96, 16)
    x[:, 5, 3] += 20
    for change in ("rank", "outliers", "bits"):
        errors = [error(x, repaired(axis, **{change: n})) for n in ((2, 4, 8) if change == "bits" else (0, 2, 4))]
        assert errors == sorted(errors, reverse=True) and errors[0] > 1.05 * errors[-1], (change, errors)
    assert error(x, repaired(axis, rank=0, outliers=0)) == error(x, repaired(axis).codes)
    assert error(x, repaired(axis, rank=16, outliers=0)) < 2e-3 * error(x, repaired(axis).codes)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(BadInput, match="fewer than 8 outliers"):
        encode(torch.zeros(32, 8), Repaired(Int(4, "channel", 8), 32, 1, 4))
    with pytest.raises(BadInput, match="as rank"):
        encode(torch.zeros(32, 8), Repaired(Int(4, "channel", 8), 32, 9, 0))
    with pytest.raises(BadInput, match="whole token groups"):
        Repaired(Int(4, "token", 16), 24)
    with pytest.raises(BadInput, match="not a multiple of the group 3"):
        encode(torch.zeros(4, 8), Int(8, "channel", 3))
    with pytest.raises(BadInput, match="give whole groups"):
        encode(torch.zeros(5, 8), Int(8, "token", 4))
    with pytest.raises(BadInput, match="do not fill bytes of 2"):
        encode(torch.zeros(4, 7), Int(4, "channel", 7))
