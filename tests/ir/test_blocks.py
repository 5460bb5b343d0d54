"""Block formats: against a scalar implementation written from the description of the formats, and against the gguf package."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.blocks import FORMATS, Stored, block_format, decode


def half(block: bytes, at: int) -> np.float32:
    return np.float32(struct.unpack_from("<e", block, at)[0])


def code32(name: str, block: bytes, i: int, start: int) -> int:
    """Code i of a block of 32: sixteen low nibbles, then sixteen high ones; fifth bits in four bytes before them."""
    byte = block[start + i % 16]
    code = byte & 15 if i < 16 else byte >> 4
    if name.startswith("Q5"):
        code += 16 * (struct.unpack_from("<I", block, start - 4)[0] >> i & 1)
    return code


def scales(block: bytes, run: int) -> tuple[np.float32, np.float32]:
    """Six-bit scale and minimum of run 0 to 7 of a Q4_K or Q5_K block."""
    packed = block[4:16]
    if run < 4:
        return np.float32(packed[run] & 63), np.float32(packed[run + 4] & 63)
    low = packed[run + 4]
    return np.float32((low & 15) + 16 * (packed[run - 4] >> 6)), np.float32((low >> 4) + 16 * (packed[run] >> 6))


def weight(name: str, block: bytes, i: int) -> np.float32:
    """Weight i of a block, in fp32 step by step."""
    match name:
        case "F32":
            return np.float32(struct.unpack("<f", block)[0])
        case "F16":
            return half(block, 0)
        case "BF16":
            return np.frombuffer(b"\0\0" + block, "<f4")[0]
        case "Q4_0" | "Q5_0":
            start, middle = (2, 8) if name == "Q4_0" else (6, 16)
            return half(block, 0) * np.float32(code32(name, block, i, start) - middle)
        case "Q4_1" | "Q5_1":
            return half(block, 0) * np.float32(code32(name, block, i, 4 if name == "Q4_1" else 8)) + half(block, 2)
        case "Q8_0":
            return half(block, 0) * np.float32(struct.unpack_from("<b", block, 2 + i)[0])
        case "Q4_K" | "Q5_K":
            byte = block[(16 if name == "Q4_K" else 48) + i // 64 * 32 + i % 32]
            code = byte & 15 if i % 64 < 32 else byte >> 4
            if name == "Q5_K":
                code += 16 * (block[16 + i % 32] >> i // 32 & 1)
            scale, minimum = scales(block, i // 32)
            return half(block, 0) * scale * np.float32(code) - half(block, 2) * minimum
        case "Q6_K":
            side, quarter, lane = i // 128, i % 128 // 32, i % 32
            byte = block[side * 64 + quarter % 2 * 32 + lane]
            code = (byte & 15 if quarter < 2 else byte >> 4) + 16 * (block[128 + side * 32 + lane] >> 2 * quarter & 3)
            scale = np.float32(struct.unpack_from("<b", block, 192 + i // 16)[0])
            return half(block, 208) * scale * np.float32(code - 32)
    raise AssertionError(name)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the last bit, the sign of zero included; any NaN equals any other."""
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(found.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("name", FORMATS)
@given(data=st.data())
def test_weights_are_those_of_the_format(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    block = data.draw(st.binary(min_size=form.nbytes, max_size=form.nbytes))
    with np.errstate(all="ignore"):
        expected = np.array([weight(name, block, i) for i in range(form.elements)], np.float32)
    same(decode(torch.frombuffer(bytearray(block), dtype=torch.uint8), name).numpy(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_agree_with_the_gguf_package(name: str) -> None:
    form = FORMATS[name]
    assert (form.elements, form.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    rows = torch.randint(0, 256, (3, 4, form.row_bytes(512)), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name])
    found = decode(rows, name)
    assert found.shape == (3, 4, 512)
    same(found.numpy(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_may_lie_anywhere_in_a_buffer(name: str) -> None:
    form = FORMATS[name]
    rows = torch.randint(0, 256, (2, form.row_bytes(256)), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    shifted = torch.zeros(rows.numel() + 1, dtype=torch.uint8)
    shifted[1:] = rows.flatten()
    same(decode(shifted[1:].view_as(rows), name).numpy(), decode(rows, name).numpy())
    padded = torch.zeros(2, rows.shape[1] + 3, dtype=torch.uint8)
    padded[:, 3:] = rows
    same(decode(padded[:, 3:], name).numpy(), decode(rows, name).numpy())


def test_rows_of_a_stored_weight_in_another_order() -> None:
    blocks = torch.randint(0, 256, (4, 18), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(Stored("Q4_0", blocks, order).decode(), decode(blocks, "Q4_0")[order])
    assert torch.equal(Stored("Q4_0", blocks[order]).decode(), Stored("Q4_0", blocks, order).decode())
    apart = Stored("Q4_0", blocks[:1], order, (blocks[1:3], blocks[3:]))
    assert torch.equal(apart.in_order(), blocks[order]) and torch.equal(apart.decode(), Stored("Q4_0", blocks, order).decode())
    assert Stored("Q4_0", blocks).in_order() is blocks
    bias = torch.arange(4.0)
    assert torch.equal(Stored("F32", bias.view(torch.uint8), order).decode(), bias[order])


def test_what_is_no_row_of_blocks_is_refused() -> None:
    with pytest.raises(BadInput, match="unknown block format 'Q2_K'; expected one of F32"):
        block_format("Q2_K")
    with pytest.raises(BadInput, match="Q4_0 rows are bytes, 18 for 32 weights"):
        decode(torch.zeros(19, dtype=torch.uint8), "Q4_0")
    with pytest.raises(BadInput, match="rows are bytes"):
        decode(torch.zeros(18), "Q4_0")
    with pytest.raises(BadInput, match="a row of 100 is not whole blocks"):
        FORMATS["Q8_0"].row_bytes(100)
