"""Packings of weights: exact inverses, and the documented places of the bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.packing import PANEL, pack, packing_of, panel_bytes, panels, unpack
from elision.ir.weights import Int4, Int8, weight_encoding

FORMATS = ["Q8_0", "Q4_1", "Q4_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "BF16", "F16"]
FORMATS += ["int8(group=32)", "int8(group=4)", "int8(group=row)", "int4(group=32)", "int4(group=8)", "int4(group=64)"]


def some_rows(format: str, *lead: int, blocks: int, seed: int = 0) -> tuple[torch.Tensor, int]:
    """Stored rows of any bytes, and how many weights a row has."""
    encoding = weight_encoding(format)
    k = 40 if format == "int8(group=row)" else encoding.block(1).elements * blocks
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*lead, encoding.row_bytes(k)), dtype=torch.uint8, generator=generator), k


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=12, deadline=None)
@given(n=st.integers(1, 40), blocks=st.integers(1, 3), experts=st.sampled_from([(), (2,)]), seed=st.integers(0, 99))
def test_unpacking_gives_back_every_byte(format: str, n: int, blocks: int, experts: tuple[int, ...], seed: int) -> None:
    rows, k = some_rows(format, *experts, n, blocks=blocks, seed=seed)
    packing = packing_of(weight_encoding(format), k)
    assert packing == f"panel:{format}"
    packed = pack(rows, packing)
    assert packed.numel() == (experts[0] if experts else 1) * panels(n) * panel_bytes(packing, k)
    assert torch.equal(unpack(packed, packing, (*experts, n, k)), rows)


@pytest.mark.parametrize("format", FORMATS)
def test_every_stored_bit_moves_to_a_place_of_its_own(format: str) -> None:
    """One bit set in a block is one bit set in the panel: nothing is lost, doubled or grown."""
    rows, k = some_rows(format, PANEL, blocks=1)
    bits = torch.zeros_like(rows)
    bits[3, :] = torch.tensor([1 << (i % 8) for i in range(rows.shape[1])], dtype=torch.uint8)
    packed = pack(bits, f"panel:{format}")
    assert sum(int(b).bit_count() for b in packed.tolist()) == rows.shape[1]


def test_float32() -> None:
    weight = torch.randn(21, 7, generator=torch.Generator().manual_seed(0))
    packed = pack(weight, "panel:f32")
    assert torch.equal(packed.view(torch.float32).view(2, 7, 16)[1, :, 2], weight[18])
    assert torch.equal(unpack(packed, "panel:f32", (21, 7)), weight)


def test_the_documented_places() -> None:
    """Codes of int8, nibbles of int4, and the high bits of Q5_0 and Q6_K, read as `elision.ir.packing` says."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    o, k = 19, 45
    rows = Int8(32).encode(weight)
    panel = pack(rows, "panel:int8(group=32)").view(2, 2, 544)[o // 16, k // 32]
    code = rows.view(32, 2, 34)[o, k // 32, 2 + k % 32]
    assert panel[32 + (k % 32 // 4) * 64 + (o % 16) * 4 + k % 4] == code
    rows = Int4(32).encode(weight)
    panel = pack(rows, "panel:int4(group=32)").view(2, 2, 320)[o // 16, k // 32]
    assert torch.equal(panel[32 + o % 16 * 2 : 34 + o % 16 * 2], rows.view(32, 2, 20)[o, k // 32, 2:4])
    byte = panel[64 + (k % 32 // 8) * 64 + (o % 16) * 4 + k % 4]
    assert (byte >> 4 * (k % 8 // 4)) & 15 == rows.view(32, 2, 20)[o, k // 32, 4 + k % 16] >> 4 * (k % 32 // 16) & 15

    rows, _ = some_rows("Q5_0", 16, blocks=1)
    panel = pack(rows, "panel:Q5_0")
    for k in (0, 9, 30):
        assert panel[32 + 5 * 4 + k % 4] >> (k // 4) & 1 == rows[5, 2 + k // 8] >> (k % 8) & 1
    rows, _ = some_rows("Q6_K", 16, blocks=1)
    panel = pack(rows, "panel:Q6_K")
    for k in (3, 77, 250):  # Q6_K: byte 128 + 32 h + i has two bits each of the weights i, i + 32, .. of half h
        run = panel[32 + 256 :].view(16, 192)[k // 16]
        stored = rows[5, 128 + 32 * (k // 128) + k % 32] >> 2 * (k % 128 // 32) & 3
        assert run[5 * 4 + k % 4] >> 2 * (k % 16 // 4) & 3 == stored


def test_rows_without_panels() -> None:
    assert packing_of(Int8(6), 12) is None and packing_of(Int4(4), 8) is None and packing_of(Int8(None), 6) is None
    assert packing_of(None, 7) == "panel:f32"
    with pytest.raises(BadInput, match="no panels"):
        pack(Int8(6).encode(torch.ones(2, 12)), "panel:int8(group=6)")
    with pytest.raises(BadInput, match="unknown packing"):
        pack(torch.ones(2, 12), "rows:f32")
