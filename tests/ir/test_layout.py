from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_cases import ARRANGEMENTS, CAPACITY, CHANNEL4, CHANNEL8, F64, TOKEN4, TOKEN8, is_ring, kv, make, seg

from elision.errors import BadInput
from elision.ir.array_store import ArrayStore
from elision.ir.encoding import decode, encode
from elision.ir.layout import Plane, nbytes, row_bytes
from elision.ir.states import KV, Array, Dense, Float, Int, Journal, Repaired, Segment, Snapshot
from elision.ir.store import KVStore

ENCODINGS = [F64, Float("bf16"), CHANNEL8, CHANNEL4, TOKEN8, TOKEN4, Repaired(TOKEN4, 4, 1, 1), Repaired(CHANNEL8, 4, 2, 0)]


def test_the_blocked_layout() -> None:
    """Keys: element (slot s, channel d) at [s // 16, d, s % 16]; values: at [s // 16, s % 16, d]."""
    rows = torch.arange(19 * 4.0).view(1, 1, 19, 4)
    b, h = torch.zeros(1, 1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    for keys in (True, False):
        plane = Plane(Float(), 1, 1, 20, 4, keys=keys)
        plane.write(b, h, torch.arange(19), rows)
        assert plane.arrays["codes"].shape == ((1, 1, 2, 4, 16) if keys else (1, 1, 2, 16, 4))
        at = (1, 3, 2) if keys else (1, 2, 3)
        assert float(plane.arrays["codes"][0, 0][at]) == 18 * 4 + 3
        assert torch.equal(plane.read_all(19, torch.float32), rows)


@given(st.sampled_from(ENCODINGS), st.booleans(), st.integers(0, 99))
def test_write_read_and_copy(enc: Float | Int | Repaired, keys: bool, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    group = enc.token_group
    plane = Plane(enc, 3, 2, 20, 4, keys=keys)
    b, h = torch.tensor([2, 0])[:, None, None], torch.arange(2)[:, None]
    first = torch.randperm(20 // group, generator=gen)[: 8 // group] * group
    slots = (first[:, None] + torch.arange(group)).flatten()
    rows = torch.randn(2, 2, len(slots), 4, generator=gen, dtype=torch.float64)
    wanted = decode(encode(rows, enc), enc, torch.float64)
    plane.write(b, h, slots, rows)
    assert torch.equal(plane.read(b, h, slots, torch.float64), wanted)
    assert torch.equal(plane.read_all(20, torch.float64)[[2, 0]][:, :, slots], wanted)
    assert torch.equal(
        plane.read_all(19, torch.float64, torch.tensor([2])), plane.read_all(20, torch.float64)[2:, :, :19]
    )
    other = Plane(enc, 3, 2, 12, 4, keys=keys)
    other.copy(plane, b, h, slots, torch.arange(8))
    assert torch.equal(other.read_all(8, torch.float64)[[2, 0]], wanted)
    assert not bool(other.read_all(12, torch.float64)[1].any()) or isinstance(enc, Int | Repaired)


@given(
    st.sampled_from(sorted(ARRANGEMENTS)),
    st.integers(1, 3),
    st.sampled_from([1, 8, 13, CAPACITY]),
    st.booleans(),
    st.sampled_from(["per_layer", "per_head"]),
)
def test_bytes_follow_from_the_type(name: str, rows: int, capacity: int, scratch: bool, keep: str) -> None:
    type = kv(*ARRANGEMENTS[name], scratch=scratch, keep=keep)
    assert nbytes(type, rows, capacity) == KVStore(type, rows, capacity).bytes()


def test_bytes_in_numbers() -> None:
    """Keys and values, positions (4 bytes) and two lengths (8 bytes) per row."""
    assert nbytes(KV(3, 64, 64, (Segment(Dense()),)), 2, 512) == 2 * (3 * 512 * 64 * 4 * 2 + 512 * 4 + 16)
    four = Int(4, "channel", 32)
    body = 3 * 512 * (32 + 2 * 4) * 2
    assert nbytes(KV(3, 64, 64, (Segment(Dense(), four, four),)), 1, 512) == body + 512 * 4 + 16
    assert row_bytes(KV(3, 64, 64, (Segment(Dense(), four, four),))) == 3 * (32 + 2 * 4) * 2
    one = nbytes(kv(seg(Dense(), shared=True), seg(Dense())), 1, 16)
    assert nbytes(kv(seg(Dense(), shared=True), seg(Dense())), 2, 16) < 2 * one


@pytest.mark.parametrize("undo", [None, Journal(5), Snapshot()])
def test_array_bytes(undo: Journal | Snapshot | None) -> None:
    type = Array((3, 4), "f16", undo=undo)
    assert nbytes(type, 2) == ArrayStore(type, 2).bytes()
    assert nbytes(type, 2) >= 2 * 3 * 4 * 2 * {None: 1, Journal(5): 6, Snapshot(): 2}[undo]


def test_an_encoding_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="not a multiple of the group 32"):
        nbytes(KV(2, 48, 64, (Segment(Dense(), Int(8, "channel", 32)),)), 1, 8)


def test_shared_rows_are_stored_once() -> None:
    store, _ = make(kv(*ARRANGEMENTS["prefix+dense"]), 3)
    assert not is_ring(store.type) and store.segments[0].planes["k"].rows == 1
    assert store.entries("k", 8).shape[0] == 3
    assert store.fork().segments[0].planes["k"] is store.segments[0].planes["k"]
