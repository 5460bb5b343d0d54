"""The GGUF container: a header, metadata and tensor descriptions, then the tensors' bytes, all in one mapped file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). Nothing is believed:
every size is checked against the file before anything is allocated for it, and arrays of numbers stay views of the file.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from elision.errors import BadInput
from elision.ir.blocks import FORMATS, Stored

#: Scalar types of metadata by number; 7 is a bool, 8 a string and 9 an array.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9

#: Block formats by their number in the file, and the names of those that cannot be read.
_FORMATS = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}
_UNREADABLE = {
    10: "Q2_K", 11: "Q3_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

# Generous limits: what is larger is damage, not a model.
_MOST_ENTRIES, _MOST_TENSORS, _MOST_STRINGS = 2**16, 2**18, 2**20
_LONGEST_NAME, _LONGEST_TEXT, _MOST_AXES = 2**16, 2**23, 4


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of the file: ``shape`` outermost axis first (rows, then weights of a row), ``offset`` from the file's start."""

    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int


class GGUF:
    """An open file: ``metadata`` (texts, numbers, lists of texts, arrays of numbers) and ``tensors`` by name."""

    def __init__(self, path: Path, data: mmap.mmap, metadata: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.path, self.metadata, self.tensors = path, metadata, tensors
        self._data = data

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUF:
        """Map and check a file. Raises BadInput saying what is wrong with it."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                # A private copy-on-write mapping: views of it are ordinary tensors, the file stays as it is.
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if size else None
        except OSError as error:
            raise BadInput(f"{path} cannot be opened: {error.strerror or error}") from error
        if data is None:
            raise BadInput(f"{path} is empty; expected a GGUF file")
        reader = _Reader(path, data)
        metadata, tensors = reader.header()
        return cls(path, data, metadata, tensors)

    def stored(self, name: str) -> Stored:
        """A tensor as it lies in the file: its blocks are a view of the mapping."""
        info = self.tensors[name]
        flat = torch.frombuffer(self._data, dtype=torch.uint8, count=info.nbytes, offset=info.offset)
        return Stored(info.format, flat.view(*info.shape[:-1], -1))


class _Reader:
    """Reads the header front to back; ``at`` is the next byte."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, reason: str) -> NoReturn:
        raise BadInput(f"{self.path} is not a readable GGUF file: {reason}")

    def need(self, nbytes: int, what: str) -> int:
        """Take this many bytes; returns where they start."""
        start, left = self.at, len(self.data) - self.at
        if nbytes > left:
            self.fail(f"it ends within {what} ({nbytes} bytes expected at {start}, {left} left); download it again")
        self.at += nbytes
        return start

    def number(self, form: str, what: str) -> Any:
        return struct.unpack_from(form, self.data, self.need(struct.calcsize(form), what))[0]

    def count(self, most: int, least_bytes: int, what: str) -> int:
        """How many things follow, each of at least ``least_bytes`` bytes."""
        found = int(self.number("<Q", f"the number of {what}"))
        if found > most or found * least_bytes > len(self.data) - self.at:
            self.fail(f"it claims {found} {what}, more than the file can hold; download it again")
        return found

    def text(self, longest: int, what: str) -> str:
        length = int(self.number("<Q", f"the length of {what}"))
        if length > longest:
            self.fail(f"{what} has {length} bytes, the most is {longest}; download it again")
        start = self.need(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8; download it again")

    def header(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if len(self.data) < 4 or self.data[:4] != b"GGUF":
            self.fail(f"it starts with {bytes(self.data[:4])!r}, not with b'GGUF'")
        self.at = 4
        version = int(self.number("<I", "the version"))
        if version not in (2, 3):
            swapped = version.to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3")
            self.fail("it is big-endian; expected little-endian" if swapped else f"its version is {version}; expected 2 or 3")
        tensors = self.count(_MOST_TENSORS, 24, "tensors")
        entries = self.count(_MOST_ENTRIES, 13, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text(_LONGEST_NAME, "a metadata key")
            if key in metadata:
                self.fail(f"it has the metadata key {key!r} twice")
            metadata[key] = self.value(key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"general.alignment is {alignment!r}; expected a power of two")
        found = [self.tensor(alignment) for _ in range(tensors)]
        return metadata, self.place(found, alignment)

    def value(self, key: str) -> Any:
        kind = int(self.number("<I", f"the type of {key!r}"))
        if kind == _STRING:
            return self.text(_LONGEST_TEXT, f"the text {key!r}")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            self.fail(f"{key!r} has the unknown type {kind}")
        form = np.dtype(_SCALARS[kind])
        start = self.need(form.itemsize, f"the value of {key!r}")
        found = np.frombuffer(self.data, form, 1, start)[0].item()
        return self.bool(found, key) if kind == _BOOL else found

    def bool(self, value: int, key: str) -> bool:
        if value > 1:
            self.fail(f"{key!r} is neither true nor false but {value}")
        return value == 1

    def array(self, key: str) -> Any:
        kind = int(self.number("<I", f"the element type of {key!r}"))
        what = f"elements of {key!r}"
        if kind == _STRING:
            return [self.text(_LONGEST_TEXT, what) for _ in range(self.count(_MOST_STRINGS, 8, what))]
        if kind not in _SCALARS:
            self.fail(f"the elements of {key!r} have the type {kind}; expected numbers or texts")
        form = np.dtype(_SCALARS[kind])
        length = self.count(2**63, form.itemsize, what)
        found = np.frombuffer(self.data, form, length, self.need(length * form.itemsize, what))
        return found.view(np.bool_) if kind == _BOOL and not (found > 1).any() else found

    def tensor(self, alignment: int) -> TensorInfo:
        """One description; its offset still counts from the start of the tensors' bytes."""
        name = self.text(_LONGEST_NAME, "the name of a tensor")
        axes = int(self.number("<I", f"the number of axes of {name!r}"))
        if not 1 <= axes <= _MOST_AXES:
            self.fail(f"tensor {name!r} has {axes} axes; expected 1 to {_MOST_AXES}")
        shape = tuple(int(self.number("<Q", f"the shape of {name!r}")) for _ in range(axes))[::-1]
        kind = int(self.number("<I", f"the type of {name!r}"))
        offset = int(self.number("<Q", f"the offset of {name!r}"))
        if kind not in _FORMATS:
            self.fail(
                f"tensor {name!r} is stored as {_UNREADABLE.get(kind, f'type {kind}')}; expected one of {', '.join(FORMATS)}"
            )
        form = FORMATS[_FORMATS[kind]]
        if min(shape) < 1 or shape[-1] % form.elements:
            self.fail(f"tensor {name!r} has the shape {shape}, which is not whole {form.name} blocks of {form.elements}")
        if offset % alignment:
            self.fail(f"tensor {name!r} lies at {offset}, not at a multiple of {alignment}")
        return TensorInfo(name, shape, form.name, offset, prod(shape[:-1]) * form.row_bytes(shape[-1]))

    def place(self, tensors: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
        """Offsets from the file's start, in file order, after checking that all lie in the file and none in another."""
        start, size = self.at + -self.at % alignment, len(self.data)
        placed: dict[str, TensorInfo] = {}
        end, before = start, ""
        for info in sorted(tensors, key=lambda t: t.offset):
            offset = start + info.offset
            if info.name in placed:
                self.fail(f"it has two tensors {info.name!r}")
            if offset + info.nbytes > size:
                self.fail(
                    f"tensor {info.name!r} ends at byte {offset + info.nbytes} of {size}: the file is cut off; download it again"
                )
            if offset < end:
                self.fail(f"the tensors {before!r} and {info.name!r} overlap")
            placed[info.name] = TensorInfo(info.name, info.shape, info.format, offset, info.nbytes)
            end, before = offset + info.nbytes, info.name
        return placed
