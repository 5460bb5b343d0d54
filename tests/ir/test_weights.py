"""Encodings of weights: against a scalar implementation of their description, and what rounding may do."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.blocks import Stored, decode
from elision.ir.retype import convert
from elision.ir.types import Tensor
from elision.ir.weights import Blocks, Encoded, Int4, Int8, WeightEncoding, weight_encoding

INTEGERS: list[WeightEncoding] = [Int8(32), Int8(8), Int8(None), Int4(32), Int4(6)]


def half(data: bytes, at: int) -> float:
    found: float = struct.unpack_from("<e", data, at)[0]
    return found


def f32(x: float | Fraction) -> float:
    """The fp32 number nearest to x."""
    return float(np.float32(float(x)))


def scalar_decode(encoding: WeightEncoding, row: bytes, width: int) -> list[float]:
    """A row by the description, number by number; every product and sum is exact in double precision before it is rounded."""
    found: list[float] = []
    for i in range(width):
        if isinstance(encoding, Int8):
            size = encoding.group or width
            at = i // size * (2 + size)
            found.append(f32(half(row, at) * struct.unpack_from("<b", row, at + 2 + i % size)[0]))
        else:
            assert isinstance(encoding, Int4)
            size = encoding.group
            at, j = i // size * (4 + size // 2), i % size
            byte = row[at + 4 + j % (size // 2)]
            code = byte & 15 if j < size // 2 else byte >> 4
            found.append(f32(Fraction(f32(half(row, at) * code)) + Fraction(half(row, at + 2))))
    return found


def finite_row(data: st.DataObject, encoding: WeightEncoding, width: int) -> bytes:
    """A stored row with any codes and any finite scales."""
    row = bytearray(data.draw(st.binary(min_size=encoding.row_bytes(width), max_size=encoding.row_bytes(width))))
    block = encoding.block(width).nbytes
    for at in range(0, len(row), block):
        for k in range(1 if isinstance(encoding, Int8) else 2):
            struct.pack_into("<e", row, at + 2 * k, data.draw(st.floats(-1000, 1000, width=16)))
    return bytes(row)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found, expected)


@pytest.mark.parametrize("encoding", INTEGERS, ids=str)
@given(data=st.data())
def test_decoding_is_what_the_description_says(encoding: WeightEncoding, data: st.DataObject) -> None:
    width = encoding.block(96).elements * data.draw(st.integers(1, 3))
    row = finite_row(data, encoding, width)
    found = encoding.decode(torch.frombuffer(bytearray(row), dtype=torch.uint8), width)
    same(found, torch.tensor(scalar_decode(encoding, row, width)))


def scalar_half_up(x: float) -> float:
    """The smallest fp16 number that is not less than x."""
    found = np.float16(x)
    return float(found if float(found) >= x else np.nextafter(found, np.float16(np.inf)))


def scalar_encode(encoding: WeightEncoding, w: list[float]) -> bytes:
    """A row by the description, for groups whose numbers are not codes already."""
    size = encoding.block(len(w)).elements
    out = b""
    for start in range(0, len(w), size):
        group = w[start : start + size]
        if isinstance(encoding, Int8):
            d = scalar_half_up(f32(f32(max(map(abs, group))) / 127))
            codes = [max(-127, min(127, round(f32(x / d)) if d else 0)) for x in group]
            out += struct.pack(f"<e{size}b", d, *codes)
        else:
            m = -scalar_half_up(-min(group))
            d = scalar_half_up(f32(f32(max(group) - m) / 15))
            codes = [max(0, min(15, round(f32(f32(x - m) / d)) if d else 0)) for x in group]
            out += struct.pack("<ee", d, m)
            out += bytes(codes[i] | codes[i + size // 2] << 4 for i in range(size // 2))
    return out


@pytest.mark.parametrize("encoding", INTEGERS, ids=str)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]), shift=st.floats(-2, 2, width=32))
def test_encoding_is_what_the_description_says(encoding: WeightEncoding, seed: int, scale: float, shift: float) -> None:
    w = (torch.randn(2, 96, generator=torch.Generator().manual_seed(seed)) + shift) * scale
    expected = [list(scalar_encode(encoding, row.tolist())) for row in w]
    found = encoding.encode(w)
    same(found, torch.tensor(expected, dtype=torch.uint8))


@pytest.mark.parametrize("encoding", INTEGERS, ids=str)
@given(numbers=st.lists(st.floats(-60000, 60000, width=32), min_size=96, max_size=96))
def test_the_error_is_half_a_step(encoding: WeightEncoding, numbers: list[float]) -> None:
    w = torch.tensor(numbers)
    size = encoding.block(96).elements
    error = (encoding.decode(encoding.encode(w), 96).double() - w.double()).abs().view(-1, size).amax(1)
    groups = w.double().view(-1, size)
    most = groups.abs().amax(1)
    step = most / 127 if isinstance(encoding, Int8) else (groups.amax(1) - groups.amin(1) + most * 2**-10) / 15
    step = step * (1 + 2**-10) + 2**-24  # the scale is rounded up to fp16, whose smallest step this is
    assert bool((error <= step / 2 + most * 2**-22).all())


def codes_of(w: torch.Tensor, size: int) -> bool:
    """Whether every group has codes for its lowest and highest number that say its scale: it is not constant."""
    groups = w.view(-1, size)
    return bool((groups.amax(1) > groups.amin(1)).all())


@given(data=st.data())
def test_four_bits_give_back_what_four_bits_gave(data: st.DataObject) -> None:
    """Groups that are d * q + m already keep their numbers, whichever codes they use, from the floats alone."""
    size = data.draw(st.sampled_from([8, 32]))
    seed = data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    lowest, highest = sorted(data.draw(st.lists(st.integers(0, 15), min_size=2, max_size=2)))
    codes = torch.randint(lowest, highest + 1, (4, 3, size), generator=generator)
    d = (torch.rand(4, 3, 1, generator=generator) * data.draw(st.sampled_from([0.001, 0.1, 4.0])) + 1e-4).half().float()
    m = torch.randn(4, 3, 1, generator=generator).mul(data.draw(st.sampled_from([0.01, 1.0]))).half().float()
    w = (codes * d + m).flatten(1)
    if codes_of(w, size):
        same(Int4(size).decode(Int4(size).encode(w), 3 * size), w)


@given(seed=st.integers(0, 2**32))
def test_blocks_with_the_same_bytes_are_taken_over(seed: int) -> None:
    """Q4_1 becomes int4:group=32 and Q8_0 int8:group=32 by their bytes, whatever these are."""
    generator = torch.Generator().manual_seed(seed)
    for name, wanted in (("Q4_1", Int4(32)), ("Q8_0", Int8(32))):
        blocks = torch.randint(0, 256, (4, 2 * Blocks(name).block(32).nbytes), dtype=torch.uint8, generator=generator)
        order = torch.randperm(4, generator=generator)
        before = Tensor((4, 64), "f32")
        weight = decode(blocks, name)[order]
        found = convert({"w": weight}, {"w": before}, {"w": before.stored(wanted)}, {"w": Stored(name, blocks, order)})["w"]
        same(found, blocks[order])
        assert torch.equal(wanted.decode(found, 64).nan_to_num(), weight.nan_to_num())


def test_zeros_and_constants() -> None:
    for encoding in INTEGERS:
        for value in (0.0, -0.0, 1.5, -3.0) if isinstance(encoding, Int4) else (0.0, -0.0, 127.0, -63.5):
            w = torch.full((2, 96), value)
            same(encoding.decode(encoding.encode(w), 96), w)
    tiny = torch.full((1, 96), 1e-12)
    assert all(float((e.decode(e.encode(tiny), 96) - tiny).abs().max()) <= 2**-25 for e in INTEGERS)


def test_halves() -> None:
    w = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(0))
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        stored = Blocks(name).encode(w)
        assert stored.shape == (3, 4, 20) and stored.dtype == torch.uint8
        same(Blocks(name).decode(stored, 10), w.to(dtype).float())


def test_bytes_of_a_row() -> None:
    for encoding, size in ((Int8(32), 102), (Int8(None), 98), (Int4(32), 60), (Blocks("Q4_1"), 60), (Blocks("BF16"), 192)):
        assert encoding.row_bytes(96) == size
        if encoding != Blocks("Q4_1"):
            assert encoding.encode(torch.zeros(1, 96)).shape == (1, size)
    type = Tensor((7, 96), "f32", Int4(32))
    assert type.storage == ((7, 60), torch.uint8) and Tensor((7, 96), "bf16").storage == ((7, 96), torch.bfloat16)
    assert str(type) == "f32[7, 96] in int4(group=32)"


def test_rows_are_decoded_where_they_are_needed() -> None:
    w = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0))
    encoded = Encoded(Int8(32).encode(w), Int8(32), 64, torch.float64)
    whole = encoded.decode()
    assert encoded.shape == (5, 3, 64) == tuple(whole.shape) and whole.dtype == torch.float64
    same(encoded[2], whole[2])
    same(encoded[torch.tensor([[4, 0], [1, 1]])], whole[torch.tensor([[4, 0], [1, 1]])])


@pytest.mark.parametrize("encoding", [*INTEGERS, Blocks("Q6_K"), Blocks("BF16")], ids=str)
def test_text(encoding: WeightEncoding) -> None:
    assert weight_encoding(str(encoding)) == encoding


@pytest.mark.parametrize(
    "text", ["int8", "int8()", "int8(group=0)", "int8(group=-1)", "int4(group=row)", "int4(group=3)", "Q2_K", " Q4_0", ""]
)
def test_what_is_no_encoding_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"unknown encoding|expected an even group"):
        weight_encoding(text)


def test_what_cannot_be_stored_is_refused() -> None:
    for encoding in (Int8(32), Int4(32)):
        with pytest.raises(BadInput, match="a row of 40 is not whole blocks"):
            encoding.encode(torch.zeros(2, 40))
        for bad in (math.inf, math.nan):
            with pytest.raises(BadInput, match="not finite"):
                encoding.encode(torch.full((1, 32), bad))
        with pytest.raises(BadInput, match="too large"):
            encoding.encode(torch.full((1, 32), 1e30))
    with pytest.raises(BadInput, match="too large"):
        Blocks("F16").encode(torch.full((1, 32), 1e30))
    with pytest.raises(BadInput, match="Q4_K blocks come from files"):
        Blocks("Q4_K").encode(torch.zeros(1, 256))
    with pytest.raises(BadInput, match="rows of 32 weights are 34 bytes"):
        Int8(32).decode(torch.zeros(2, 33, dtype=torch.uint8), 32)
    with pytest.raises(BadInput, match="expected at least 1"):
        Tensor((3, 0), "f32", Int8(None))
    with pytest.raises(BadInput, match="is no weight"):
        Tensor((32,), "f32", Int8(32))
    with pytest.raises(BadInput, match="is no weight"):
        Tensor((4, 32), "i64", Int8(32))
    with pytest.raises(BadInput, match="w: .*not finite"):
        plain = Tensor((1, 32), "f32")
        convert({"w": torch.full((1, 32), math.nan)}, {"w": plain}, {"w": plain.stored(Int8(32))})
    with pytest.raises(BadInput, match="cannot become"):
        convert({"w": torch.zeros(1, 34, dtype=torch.uint8)}, {"w": plain.stored(Int8(32))}, {"w": plain})
