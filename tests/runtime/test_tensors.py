"""Tensors packed into a member: mapped back without a copy, tied ones stored once, bad tables refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import ArtefactError, BadInput
from elision.runtime.archive import Archive, write_archive
from elision.runtime.tensors import DTYPES, pack_tensors, unpack_tensors


def packed(tensors: dict[str, torch.Tensor]) -> tuple[list[dict[str, Any]], memoryview]:
    table, chunks = pack_tensors(tensors)
    return json.loads(json.dumps(table)), memoryview(bytearray(b"".join(chunks)))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)), max_size=6),
    st.randoms(use_true_random=False),
)
def test_tensors_come_back(specs: list[tuple[str, list[int]]], random: Any) -> None:
    tensors = {}
    for index, (dtype, shape) in enumerate(specs):
        count = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        data = torch.tensor([random.randrange(256) for _ in range(count)], dtype=torch.uint8)
        tensors[f"t{index}"] = data.view(DTYPES[dtype]).view(shape)
    back = unpack_tensors(*packed(tensors))
    assert set(back) == set(tensors)
    assert all(same(back[name], tensor) for name, tensor in tensors.items())


def test_views_of_the_file(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(3, 4)
    tensors = {"a": weight.t(), "odd": torch.ones(3, dtype=torch.int8), "p": torch.nn.Parameter(weight)}
    table, chunks = pack_tensors(tensors)
    write_archive(tmp_path / "x", {"weights.bin": chunks})
    view = Archive.open(tmp_path / "x")["weights.bin"]
    base = torch.frombuffer(view, dtype=torch.uint8).data_ptr()
    back = unpack_tensors(table, view)
    for row in table:
        assert row["offset"] % 64 == 0
        assert back[row["name"]].data_ptr() == base + row["offset"]
        assert same(back[row["name"]], tensors[row["name"]].detach())


def test_tied_tensors_are_stored_once() -> None:
    weight = torch.randn(8, 4)
    tensors = {
        "embed": weight,
        "other": weight[:4],
        "head": torch.nn.Parameter(weight),
        "copy": weight.clone(),
    }
    table, view = packed(tensors)
    assert [(row["name"], row["aliases"]) for row in table] == [
        ("embed", ["head"]),
        ("other", []),
        ("copy", []),
    ]
    back = unpack_tensors(table, view)
    assert back["head"] is back["embed"]
    assert back["copy"].data_ptr() != back["embed"].data_ptr()
    assert all(same(back[name], tensor.detach()) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")],
    ids=["complex", "sparse", "meta"],
)
def test_what_cannot_be_stored_is_named(tensor: torch.Tensor) -> None:
    with pytest.raises(BadInput, match="'w'"):
        pack_tensors({"w": tensor})


BAD_ROWS: list[dict[str, Any]] = [
    {"name": ""}, {"name": 3}, {"name": "b"}, {"aliases": ["b"]}, {"aliases": "b"}, {"aliases": [None]},
    {"dtype": "complex64"}, {"dtype": None}, {"dtype": ["float32"]}, {"dtype": "float64"},
    {"shape": [4]}, {"shape": [2, -3]}, {"shape": [2.0, 3]}, {"shape": "6"}, {"shape": [True, 6]},
    {"shape": [2**40, 2**40]}, {"shape": [2**62, 2**62, 0], "nbytes": 0}, {"shape": [5, 4], "nbytes": 80},
    {"offset": -64}, {"offset": 4}, {"offset": 64}, {"offset": 2**70}, {"offset": 0.0}, {"offset": False},
    {"nbytes": 20}, {"nbytes": 28}, {"nbytes": "24"}, {"extra": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_ROWS, ids=str)
def test_a_bad_row_is_refused(change: dict[str, Any]) -> None:
    table, view = packed({"a": torch.ones(2, 3), "b": torch.zeros(5)})
    assert set(unpack_tensors(table, view)) == {"a", "b"}
    with pytest.raises(ArtefactError):
        unpack_tensors([table[0] | change, table[1]], view)


def test_a_bad_table_is_refused() -> None:
    table, view = packed({"a": torch.ones(16), "b": torch.zeros(16), "c": torch.zeros(16)})
    overlapping = copy.deepcopy(table)
    overlapping[2]["offset"] = 64
    tables: list[object] = [
        None, {}, "abc", [None], [{}], table[:2], table[1:], table[::-1], [*table, table[2]],
        [table[0], table[2]], overlapping,
    ]  # fmt: skip
    for bad in tables:
        with pytest.raises(ArtefactError):
            unpack_tensors(bad, view)
    for part in (view[:-1], view[:64], view[:0], memoryview(bytearray(view) + b"\0")):
        with pytest.raises(ArtefactError):
            unpack_tensors(table, part)
