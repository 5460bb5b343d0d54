"""The artefact's container: what was written comes back, and nothing else is accepted."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import ArtefactError, BadInput
from elision.runtime.archive import (
    Archive,
    _directory,
    _light_digest,
    _parse,
    _whole_digest,
    write_archive,
)

TINY = {"manifest.json": b'{"format": 1}', "weights.bin": bytes(range(40)), "kernels/a.o": b"\x7fELF"}
names = st.from_regex(r"[a-z0-9_]{1,8}(/[a-z0-9_]{1,8})?(\.[a-z]{1,4})?", fullmatch=True)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_archive(tmp_path / "tiny.elision", TINY)
    return tmp_path / "tiny.elision"


def contents(path: Path, verify: bool = True) -> dict[str, bytes]:
    archive = Archive.open(path, verify)
    return {name: bytes(archive[name]) for name in archive}


@given(st.dictionaries(names, st.lists(st.binary(max_size=200), max_size=4), max_size=6))
def test_members_come_back(tmp_path_factory: pytest.TempPathFactory, members: dict[str, list[bytes]]) -> None:
    path = tmp_path_factory.mktemp("archive") / "x.elision"
    write_archive(path, {name: iter(chunks) for name, chunks in members.items()}, bulk=list(members)[:1])
    expected = {name: b"".join(chunks) for name, chunks in members.items()}
    assert contents(path) == contents(path, verify=False) == expected
    with zipfile.ZipFile(path) as foreign:  # an ordinary zip to everybody else
        assert foreign.testzip() is None
        assert {name: foreign.read(name) for name in foreign.namelist()} == expected


def test_data_is_aligned_in_the_file_and_in_memory(tiny: Path) -> None:
    data, archive = tiny.read_bytes(), Archive.open(tiny)
    for name, value in TINY.items():
        assert data.index(value) % 64 == 0
        assert torch.frombuffer(archive[name], dtype=torch.uint8).data_ptr() % 64 == 0


def test_views_are_private_and_outlive_the_archive(tiny: Path) -> None:
    before = tiny.read_bytes()
    view = Archive.open(tiny)["weights.bin"]
    view[0] = 255
    assert bytes(view) == b"\xff" + bytes(range(1, 40))
    assert tiny.read_bytes() == before


def test_equal_members_give_equal_files(tiny: Path, tmp_path: Path) -> None:
    write_archive(tmp_path / "again", {name: [value[:3], value[3:]] for name, value in TINY.items()})
    assert (tmp_path / "again").read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize("verify", [True, False])
def test_every_flipped_bit_is_refused(tiny: Path, verify: bool) -> None:
    intact = tiny.read_bytes()
    weights = intact.index(TINY["weights.bin"])
    accepted = set()
    with tiny.open("r+b", buffering=0) as file:
        for position, byte in enumerate(intact):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                try:
                    Archive.open(tiny, verify)
                    accepted.add(position)
                except ArtefactError:
                    pass
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert accepted == (set() if verify else set(range(weights, weights + 40)))
    assert contents(tiny, verify) == TINY


@pytest.mark.parametrize("verify", [True, False])
def test_every_other_length_is_refused(tiny: Path, verify: bool) -> None:
    for size in [tiny.stat().st_size + extra for extra in (100, 64, 1)]:
        os.truncate(tiny, size)
        with pytest.raises(ArtefactError):
            Archive.open(tiny, verify)
    write_archive(tiny, TINY)
    for size in reversed(range(tiny.stat().st_size)):
        os.truncate(tiny, size)
        with pytest.raises(ArtefactError):
            Archive.open(tiny, verify)


def test_a_repacked_zip_is_refused(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(tiny) as source, zipfile.ZipFile(other, "w") as target:
        target.comment = source.comment
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ArtefactError, match="another kind of file"):
        Archive.open(other)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    foreign = [b"", b"x", b"text\n" * 100, pickle.dumps(list(range(1000))), bytes(1000), b"\xff" * 1000]
    torch.save({"w": torch.zeros(100)}, tmp_path / "model.pt")
    for data in [*foreign, (tmp_path / "model.pt").read_bytes()]:
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match="is not an (intact )?Elision artefact"):
            Archive.open(path)
    for place in (tmp_path / "missing", tmp_path, Path("/dev/zero")):
        with pytest.raises(BadInput, match=str(place)):
            Archive.open(place)


def test_sizes_beyond_the_file_are_refused_by_the_directory(tiny: Path) -> None:
    """The digests are not even computed: with the sizes believed, a view would leave the file."""
    intact = tiny.read_bytes()
    for size in (40, 13):
        for position in (at for at in range(len(intact) - 8) if intact[at : at + 8] == struct.pack("<Q", size)):
            for claim in (2**40, 2**63, 2**64 - 1):
                tiny.write_bytes(intact[:position] + struct.pack("<Q", claim) + intact[position + 8 :])
                with pytest.raises(ArtefactError, match="member|directory"):
                    Archive.open(tiny)


def test_gaps_and_overlaps_are_refused_even_under_true_digests(tiny: Path) -> None:
    data = tiny.read_bytes()
    members = _parse(memoryview(data))
    for shift in (0, 64, 1, -1, -64):
        start = members[-1].end + shift
        body = memoryview((data[: members[-1].end] + bytes(64))[:start] + _directory(members, start))
        whole = _whole_digest(body)
        tiny.write_bytes(bytes(body) + whole + _light_digest(body, members, whole))
        if shift == 0:
            assert tiny.read_bytes() == data
        else:
            with pytest.raises(ArtefactError, match="directory is damaged"):
                Archive.open(tiny)


def failing() -> Iterator[bytes]:
    yield b"half"
    raise RuntimeError("the source broke")


def test_a_failure_leaves_the_old_file_and_nothing_else(tiny: Path) -> None:
    with pytest.raises(RuntimeError, match="the source broke"):
        write_archive(tiny, {"a": b"1", "weights.bin": failing()})
    with pytest.raises(RuntimeError):
        write_archive(tiny.with_name("new"), {"weights.bin": failing()})
    assert os.listdir(tiny.parent) == [tiny.name]
    assert contents(tiny) == TINY


def test_a_failing_disk_is_reported(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadInput, match="No space left"):
        write_archive(tiny, {"a": b"1"})
    assert os.listdir(tiny.parent) == [tiny.name]
    assert contents(tiny) == TINY


def test_places_and_names_that_cannot_be_written(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing" / "x"):
        with pytest.raises(BadInput, match="could not be written"):
            write_archive(place, TINY)
    for name in ("", "/etc/passwd", "../up", "a//b", "a b", "é", ".", "a/..", "x" * 256):
        with pytest.raises(BadInput, match="named"):
            write_archive(tmp_path / "x", {name: b""})
    assert os.listdir(tmp_path) == []


def test_progress_counts_the_bytes_and_a_missing_member_is_named(tmp_path: Path) -> None:
    seen: list[int] = []
    write_archive(tmp_path / "x", {"weights.bin": [bytes(100)] * 3}, progress=seen.append)
    assert [b - a for a, b in zip(seen, seen[1:], strict=False)] == [100, 100]
    archive = Archive.open(tmp_path / "x")
    assert "weights.bin" in archive and "program.txt" not in archive
    with pytest.raises(ArtefactError, match=r"no member 'program.txt': it holds weights.bin"):
        archive["program.txt"]


def test_runtime_imports_no_transformers() -> None:
    modules = "elision.runtime.archive, elision.runtime.tensors, elision.runtime.text"
    code = f"import sys; sys.modules['transformers'] = None; import {modules}; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for foreign in ("'transformers.", "'elision.frontend", "'elision.passes", "'elision.codegen"):
        assert foreign not in loaded
