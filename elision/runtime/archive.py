"""The container of ``model.elision``: a zip of stored members, written atomically and mapped into memory.

The file is a ZIP64 archive (PKWARE APPNOTE 6.3) of one canonical form: names, sizes, checksums and bulk marks
determine every byte that is not data. A reader therefore rebuilds the headers and compares, instead of
trusting fields one by one. Every member's data starts at a multiple of 64 bytes and is mapped, never copied.
The file ends, as the zip's comment, with two SHA-256 digests: of the whole file before them, and of the same
without the data of bulk members (the weights), so that a quick load still checks everything else.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import secrets
import stat
import struct
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from elision.errors import ArtefactError, BadInput

ALIGNMENT = 64
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_VERSION, _DATE, _IN_ZIP64 = 45, 0x21, 0xFFFFFFFF  # zip 4.5; 1980-01-01; "see the 64-bit field"
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_ZIP64_END = struct.Struct("<IQHHIIQQQQ")
_BULK_MARK = b"bulk"
_DIGESTS = ("sha256 %s", " without bulk %s")
_DIGEST_SIZE = sum(len(text) - 2 + 64 for text in _DIGESTS)
_TAIL_SIZE = _ZIP64_END.size + 20 + 22 + _DIGEST_SIZE

Chunks = bytes | bytearray | memoryview | Iterable[bytes | memoryview]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Member:
    """``header`` is the file offset of the local header, ``size`` the bytes of data, ``crc`` their CRC-32."""

    name: str
    header: int
    size: int
    crc: int
    bulk: bool

    @property
    def start(self) -> int:
        return _aligned(self.header + 30 + len(self.name) + 20 + 6)

    @property
    def end(self) -> int:
        return self.start + self.size

    def local(self) -> bytes:
        """The local header, padded by an extra field so that the data behind it is aligned."""
        extra_size = self.start - self.header - 30 - len(self.name)
        fixed = struct.pack(
            "<IHHHHHIIIHH", 0x04034B50, _VERSION, 0, 0, 0, _DATE, self.crc, _IN_ZIP64, _IN_ZIP64,
            len(self.name), extra_size,
        )  # fmt: skip
        zip64 = struct.pack("<HHQQ", 1, 16, self.size, self.size)
        padding = struct.pack("<HHH", 0xD935, extra_size - 24, ALIGNMENT).ljust(extra_size - 20, b"\0")
        return fixed + self.name.encode() + zip64 + padding

    def central(self) -> bytes:
        comment = _BULK_MARK if self.bulk else b""
        fixed = _CENTRAL.pack(
            0x02014B50, _VERSION, _VERSION, 0, 0, 0, _DATE, self.crc, _IN_ZIP64, _IN_ZIP64,
            len(self.name), 28, len(comment), 0, 0, 0, _IN_ZIP64,
        )  # fmt: skip
        zip64 = struct.pack("<HHQQQ", 1, 24, self.size, self.size, self.header)
        return fixed + self.name.encode() + zip64 + comment


def _directory(members: Collection[_Member], start: int) -> bytes:
    """The central directory at file offset ``start`` and the end records, without the digests."""
    entries = b"".join(member.central() for member in members)
    count, end = len(members), start + len(entries)
    return b"".join([
        entries,
        _ZIP64_END.pack(0x06064B50, 44, _VERSION, _VERSION, 0, 0, count, count, len(entries), start),
        struct.pack("<IIQI", 0x07064B50, 0, end, 1),
        struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, _IN_ZIP64, _IN_ZIP64, _DIGEST_SIZE),
    ])  # fmt: skip


def _light_digest(body: memoryview, members: Iterable[_Member], whole: bytes) -> bytes:
    """The closing text: SHA-256 of ``body`` without the data of bulk members, and of the ``whole`` text."""
    light, position = hashlib.sha256(), 0
    for member in members:
        if member.bulk:
            light.update(body[position : member.start])
            position = member.end
    light.update(body[position:])
    light.update(whole)
    return (_DIGESTS[1] % light.hexdigest()).encode()


def _whole_digest(body: memoryview) -> bytes:
    return (_DIGESTS[0] % hashlib.sha256(body).hexdigest()).encode()


def write_archive(
    path: str | os.PathLike[str],
    members: Mapping[str, Chunks],
    *,
    bulk: Collection[str] = ("weights.bin",),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``members`` to ``path`` as an archive: all of it or, after any failure, nothing.

    A member is bytes or an iterable of chunks, which is consumed once and never gathered. Members named in
    ``bulk`` are those that ``Archive.open(verify=False)`` does not hash. ``progress`` is called with the
    bytes written so far. Equal members give equal files. Raises `BadInput` for a bad name or a place that
    cannot be written.
    """
    path = Path(path)
    for name in members:
        if not _NAME.fullmatch(name) or len(name) > 255:
            raise BadInput(f"an archive member cannot be named {name!r}: use letters, digits and ._-/ only")
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                _write(file, members, bulk, progress)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # makes the new name durable, not only the bytes
        finally:
            os.close(directory)
    except OSError as error:
        raise BadInput(f"{path} could not be written: {error.strerror or error}") from error


def _write(
    file: BinaryIO,
    members: Mapping[str, Chunks],
    bulk: Collection[str],
    progress: Callable[[int], None] | None,
) -> None:
    written: list[_Member] = []
    for name, chunks in members.items():
        header = written[-1].end if written else 0
        size = crc = 0
        file.seek(_Member(name, header, 0, 0, False).start)
        for chunk in [chunks] if isinstance(chunks, bytes | bytearray | memoryview) else chunks:
            file.write(chunk)
            size += memoryview(chunk).nbytes
            crc = zlib.crc32(chunk, crc)
            if progress is not None:
                progress(file.tell())
        written.append(_Member(name, header, size, crc, name in bulk))
        file.seek(header)
        file.write(written[-1].local())
    end = written[-1].end if written else 0
    file.seek(end)
    file.write(_directory(written, end))
    file.flush()
    # Hashed from the file rather than on the way: headers are patched after their data is known.
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as body:
        whole = _whole_digest(body)
        file.write(whole + _light_digest(body, written, whole))


class Archive:
    """An archive mapped into memory: ``archive[name]`` is a view of the file, copied by nobody.

    The mapping is private (writing into a view changes this process's copy of the page only) and lives as
    long as any view of it does, so there is nothing to close.
    """

    def __init__(self, path: Path, view: memoryview, members: Iterable[_Member]) -> None:
        self.path = path
        self._view = view
        self._members = {member.name: member for member in members}

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> Archive:
        """Map and check the archive at ``path``; ``verify=False`` skips the data of bulk members only.

        Raises `BadInput` if there is no such file or it cannot be read, `ArtefactError` if it is anything
        but an intact archive. Nothing is allocated by a size that the file claims.
        """
        path = Path(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise BadInput(f"{path} is not a file: expected an artefact written by `elision compile`")
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < _TAIL_SIZE:
                    raise ArtefactError(f"{path} is not an Elision artefact: it has only {size} bytes")
                view = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
        try:
            members = _parse(view)
            body, digests = view[:-_DIGEST_SIZE], bytes(view[-_DIGEST_SIZE:])
            whole = _whole_digest(body) if verify else digests[: len(_DIGESTS[0]) - 2 + 64]
            if digests != whole + _light_digest(body, members, whole):
                raise ValueError("its contents do not match the SHA-256 at its end")
        except (ValueError, struct.error) as error:
            reason = error if isinstance(error, ValueError) else "its directory is damaged"
            raise ArtefactError(
                f"{path} is not an intact Elision artefact: {reason}; copy it again or write it anew with `elision compile`"
            ) from error
        return cls(path, view, members)

    def __getitem__(self, name: str) -> memoryview:
        """The data of member ``name``. Raises `ArtefactError` naming the members if there is none."""
        if name not in self._members:
            raise ArtefactError(f"{self.path} has no member {name!r}: it holds {', '.join(self._members)}")
        return self._view[self._members[name].start : self._members[name].end]

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)


def _parse(view: memoryview) -> list[_Member]:
    """The members, or ValueError if any byte outside their data is not what `write_archive` would write."""
    tail = len(view) - _TAIL_SIZE
    signature, *_, count, _, size, start = _ZIP64_END.unpack_from(view, tail)
    if signature != 0x06064B50 or start + size != tail:
        raise ValueError("it is another kind of file, or cut short")
    members: list[_Member] = []
    position = start
    while position < tail:
        fields = _CENTRAL.unpack_from(view, position)
        crc, name_size, comment_size = fields[7], fields[10], fields[12]
        name_end = position + _CENTRAL.size + name_size
        name = bytes(view[position + _CENTRAL.size : name_end]).decode("latin-1")
        member_size = struct.unpack_from("<Q", view, name_end + 4)[0]
        members.append(_Member(name, members[-1].end if members else 0, member_size, crc, comment_size > 0))
        if not _NAME.fullmatch(name):
            raise ValueError(f"its directory names an impossible member {name!r}")
        position = name_end + 28 + comment_size
    if len({member.name for member in members}) != len(members):
        raise ValueError("its directory names a member twice")
    end = members[-1].end if members else 0
    if end != start or _directory(members, start) != view[start:-_DIGEST_SIZE]:
        raise ValueError("its directory is damaged")
    for member in members:
        if member.local() != view[member.header : member.start]:
            raise ValueError(f"the header of its member {member.name!r} is damaged")
    return members
