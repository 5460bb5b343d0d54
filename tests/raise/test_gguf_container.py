"""The GGUF container: a file is read exactly; a damaged one is refused, with a sentence and without large allocations."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import build, entry, info, real_file, small, text
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.frontend.gguf.container import GGUF


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GGUF]:
    def open_bytes(data: bytes) -> GGUF:
        (tmp_path / "m.gguf").write_bytes(data)
        return GGUF.open(tmp_path / "m.gguf")

    return open_bytes


def test_metadata_of_every_type(opened: Callable[[bytes], GGUF]) -> None:
    found = opened(small()).metadata
    scalars = {0: 7, 1: -7, 2: 700, 3: -700, 4: 70000, 5: -70000, 6: 0.5, 7: True, 10: 2**40, 11: -(2**40), 12: 0.25}
    for kind, value in scalars.items():
        assert found[f"scalar.{kind}"] == value and type(found[f"scalar.{kind}"]) is type(value)
        assert found[f"array.{kind}"].tolist() == [value, value]
    assert found["array.7"].dtype == np.bool_
    assert found["array.8"] == ["one", "zwei \u00e9"] and found["general.architecture"] == "tiny"


def test_tensors_are_views_of_the_file(opened: Callable[[bytes], GGUF]) -> None:
    data = small()
    file = opened(data)
    start = len(data) - 232
    assert {n: (t.shape, t.format, t.offset - start, t.nbytes) for n, t in file.tensors.items()} == {
        "a": ((2, 32), "Q4_0", 0, 36), "b": ((3,), "F32", 64, 12), "c": ((2, 2, 32), "Q8_0", 96, 136),
    }  # fmt: skip
    assert file.stored("b").decode().tolist() == [1.5, -2.0, 3.0]
    assert file.stored("c").blocks.shape == (2, 2, 34) and file.stored("c").decode().shape == (2, 2, 32)
    assert file.stored("a").blocks.flatten().tolist() == list(range(36))
    file.stored("a").blocks[0, 0] = 99  # a private view
    assert file.path.read_bytes() == data


def test_a_real_file_reads_as_the_gguf_package_reads_it() -> None:
    file, expected = GGUF.open(real_file()), gguf.GGUFReader(real_file())
    fields = {name: f.contents() for name, f in expected.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for name, value in file.metadata.items():
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == fields[name], name
    assert list(file.tensors) == [t.name for t in expected.tensors]
    for tensor in expected.tensors:
        found = file.tensors[tensor.name]
        assert (found.format, found.shape) == (tensor.tensor_type.name, tuple(tensor.shape)[::-1])
        assert (found.offset, found.nbytes) == (tensor.data_offset, tensor.n_bytes)
    first = expected.tensors[2]
    assert torch.equal(file.stored(first.name).blocks, torch.from_numpy(np.copy(first.data)))


ONE = info("a", (2, 32), 2, 0)
BYTES = bytes(36)
ODD: dict[str, tuple[bytes, str]] = {
    "magic": (build([], [ONE], BYTES, magic=b"GGML"), r"starts with b'GGML', not with b'GGUF'"),
    "empty": (b"", "is empty"),
    "short": (b"GG", "starts with b'GG'"),
    "version 1": (build([], [ONE], BYTES, version=1), "its version is 1; expected 2 or 3"),
    "big-endian": (build([], [ONE], BYTES, version=3 << 24), "it is big-endian"),
    "many tensors": (build([], [ONE], BYTES, tensors=2**60), "claims 1152921504606846976 tensors, more than the file can hold"),
    "many keys": (build([], [ONE], BYTES, keys=2**16), "claims 65536 metadata entries, more than the file can hold"),
    "long key": (build([struct.pack("<Q", 2**40) + bytes(40)], [ONE], BYTES), "a metadata key has 1099511627776 bytes"),
    "long text": (build([entry("k", 8, struct.pack("<Q", 2**63))], [], BYTES), "the text 'k' has 9223372036854775808 bytes"),
    "no UTF-8": (build([entry("k", 8, text(b"\xff\xfe"))], [], b""), r"the text 'k' at byte \d+ is not UTF-8"),
    "odd type": (build([entry("k", 13, bytes(8))], [], b""), "'k' has the unknown type 13"),
    "odd bool": (build([entry("k", 7, b"\2")], [], b""), "'k' is neither true nor false but 2"),
    "array of arrays": (build([entry("k", 9, struct.pack("<IQ", 9, 1) + bytes(12))], [], b""), "elements of 'k' have the type 9"),
    "long array": (build([entry("k", 9, struct.pack("<IQ", 12, 2**61))], [], b""), "claims 2305843009213693952 elements of 'k'"),
    "long list": (build([entry("k", 9, struct.pack("<IQ", 8, 2**40))], [], b""), "claims 1099511627776 elements of 'k'"),
    "twice": (build([entry("k", 0, b"\1")] * 2, [], b""), "has the metadata key 'k' twice"),
    "alignment": (build([entry("general.alignment", 4, b"\3\0\0\0")], [], b""), "alignment is 3; expected a power of two"),
    "no axes": (build([], [info("a", (), 0, 0)], BYTES), "'a' has 0 axes"),
    "five axes": (build([], [info("a", (1,) * 5, 0, 0)], BYTES), "'a' has 5 axes"),
    "empty axis": (build([], [info("a", (0, 32), 2, 0)], BYTES), r"'a' has the shape \(0, 32\)"),
    "half a block": (build([], [info("a", (2, 33), 2, 0)], BYTES), r"the shape \(2, 33\), which is not whole Q4_0 blocks of 32"),
    "huge": (build([], [info("a", (2**62, 2**62), 0, 0)], BYTES), r"'a' ends at byte \d+ of \d+: the file is cut off"),
    "other format": (build([], [info("a", (1, 256), 10, 0)], BYTES), "'a' is stored as Q2_K; expected one of F32, F16"),
    "no format": (build([], [info("a", (1, 256), 99, 0)], BYTES), "'a' is stored as type 99"),
    "unaligned": (build([], [info("a", (2, 32), 2, 4)], BYTES * 2), "'a' lies at 4, not at a multiple of 32"),
    "outside": (build([], [info("a", (2, 32), 2, 2**40)], BYTES), r"'a' ends at byte \d+ of \d+: the file is cut off"),
    "overlap": (build([], [ONE, info("b", (2, 32), 2, 32)], BYTES * 2), "the tensors 'a' and 'b' overlap"),
    "same name": (build([], [ONE, info("a", (2, 32), 2, 64)], BYTES * 3), "has two tensors 'a'"),
}


@pytest.mark.parametrize("case", ODD)
def test_damage_is_named(case: str, opened: Callable[[bytes], GGUF]) -> None:
    data, message = ODD[case]
    with pytest.raises(BadInput, match=message):
        opened(data)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(BadInput, match=f"{path} cannot be opened"):
            GGUF.open(path)


def test_every_truncation_is_refused(opened: Callable[[bytes], GGUF]) -> None:
    data = small()
    for length in range(len(data)):
        with pytest.raises(BadInput, match="is not a readable GGUF file|is empty"):
            opened(data[:length])


def test_no_flipped_bit_crashes(opened: Callable[[bytes], GGUF]) -> None:
    """It is refused, or it changes a value that could be anything."""
    data = small()
    refused = 0
    for bit in range(8 * (len(data) - 232)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            file = opened(bytes(flipped))
        except BadInput:
            refused += 1
        else:
            assert all(file.stored(name).decode().shape == info.shape for name, info in file.tensors.items())
    assert refused > 1000


@given(st.binary(max_size=300))
def test_what_is_no_file_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "m.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + data)
    try:
        assert not GGUF.open(path).tensors  # no description of a tensor fits in so few bytes by chance
    except BadInput:
        pass


def header_bytes() -> bytes:
    return real_file().read_bytes()[: min(t.offset for t in GGUF.open(real_file()).tensors.values())]


def test_a_damaged_real_file_takes_no_memory(tmp_path: Path) -> None:
    """Bits flipped, bytes overwritten and the end cut off, in a file of 98 MB with two million bytes of header."""
    header, size, path = header_bytes(), real_file().stat().st_size, tmp_path / "m.gguf"
    random = np.random.default_rng(0)
    counts = [8, 16, header.index(b"tokenizer.ggml.tokens") + 25, header.index(b"tokenizer.ggml.token_type") + 29]
    places = [at + byte for at in counts for byte in (1, 3, 6)] + random.integers(0, len(header), 4).tolist()
    damages = [(at, bytes([header[at] ^ 0x55]), size) for at in places]
    damages += [(at, b"\xff" * 8, size) for at in random.integers(0, len(header) - 8, 4).tolist()]
    damages += [(0, b"", int(end)) for end in (*random.integers(0, len(header), 2), *random.integers(len(header), size, 2))]
    refused = 0
    for at, patch, end in damages:
        with open(path, "wb") as file:
            file.write(header[:at] + patch + header[at + len(patch) :])
            file.truncate(end)  # the weights are a hole of zeros
        tracemalloc.start()
        try:
            GGUF.open(path)
        except BadInput:
            refused += 1
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 50e6, (at, patch, end)
    assert refused >= 16, refused


def test_a_hostile_file_takes_no_memory(tmp_path: Path) -> None:
    """Counts as large as the file allows, over zeros, which read as texts of no length and tensors of no axes."""
    path = tmp_path / "m.gguf"
    for head in (
        build([entry("k", 9, struct.pack("<IQ", 8, 2**20))], [], b""),
        build([entry("k", 9, struct.pack("<IQ", 0, 60_000_000))], [], b""),
        build([], [], b"", tensors=2**18),
        build([], [], b"", keys=2**16),
        build([entry("k", 8, struct.pack("<Q", 2**23))], [], b""),
    ):
        with open(path, "wb") as file:
            file.write(head)
            file.truncate(64_000_000)
        tracemalloc.start()
        try:
            GGUF.open(path)
        except BadInput:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 50e6
