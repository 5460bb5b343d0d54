"""Damage to artefacts: to the bytes of the file, and to members under digests that are right again; a function of a seed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import elision  # noqa: E402
from elision.errors import ElisionError  # noqa: E402
from elision.runtime.archive import Archive, write_archive  # noqa: E402

Members = dict[str, bytes]
SECONDS = 60  # after which what is opened and run is taken to hang
NUMBERS = [0, 1, -1, 2, 63, 2**31, 2**63, -(2**70), 1.5, None, True, "", "x", [], {}]


def members(path: Path) -> Members:
    archive = Archive.open(path)
    return {name: bytes(archive[name]) for name in archive}


# --- of the bytes of the file: the digests no longer hold ---


def flipped(data: bytes, random: Random) -> bytes:
    found = bytearray(data)
    for _ in range(random.choice([1, 2, 40])):
        found[random.randrange(len(found))] ^= 1 << random.randrange(8)
    return bytes(found)


def cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data))]


def grown(data: bytes, random: Random) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice([1, 64, 4096])) + data[at:]


def zeroed(data: bytes, random: Random) -> bytes:
    at, n = random.randrange(len(data)), random.choice([1, 64, 4096])
    return data[:at] + bytes(min(n, len(data) - at)) + data[at + n :]


def swapped(data: bytes, random: Random) -> bytes:
    """Two stretches of a length change places."""
    n = random.choice([1, 64, 512])
    a, b = sorted(random.sample(range(0, len(data) - n), 2))
    if b < a + n:
        return data[b:] + data[:b]
    return data[:a] + data[b : b + n] + data[a + n : b] + data[a : a + n] + data[b + n :]


def twice(data: bytes, random: Random) -> bytes:
    return data + data[random.randrange(len(data)) :]


BYTES: list[Callable[[bytes, Random], bytes]] = [flipped, cut, grown, zeroed, swapped, twice]


# --- of members: the archive's digests are made anew ---


def missing(found: Members, random: Random) -> None:
    del found[random.choice(list(found))]


def renamed(found: Members, random: Random) -> None:
    name = random.choice(list(found))
    found[random.choice(["x", "weights.bin.1", "kernels/cpu", name + "x"])] = found.pop(name)


def exchanged(found: Members, random: Random) -> None:
    a, b = random.sample(list(found), 2)
    found[a], found[b] = found[b], found[a]


def copied(found: Members, random: Random) -> None:
    a, b = random.sample(list(found), 2)
    found[a] = found[b]


def resized(found: Members, random: Random) -> None:
    name = random.choice(list(found))
    n = random.choice([0, 1, len(found[name]) // 2, len(found[name]) - 1, len(found[name]) + 64])
    found[name] = found[name][:n].ljust(n, b"\0")


def edited(found: Members, random: Random) -> None:
    """A word of a text becomes another."""
    name = random.choice(["program.txt", "kernels/cpu.json", "kernels/cpu.mlir", "manifest.json"])
    text = found[name].decode()
    words = list(re.finditer(r"[\w.'-]+", text))
    if not words:
        return found.update({name: b"1"})
    start, end = random.choice(words).span()
    other = random.choice([random.choice(words)[0], *map(str, NUMBERS)])
    found[name] = (text[:start] + other + text[end:]).encode()


def tabled(found: Members, random: Random) -> None:
    """Two entries of the table of tensors change places in one field, or a field changes."""
    manifest = json.loads(found["manifest.json"])
    a, b = random.sample(manifest["tensors"], 2)
    key = random.choice(list(a))
    if random.random() < 0.5:
        a[key], b[key] = b[key], a[key]
    else:
        a[key] = _changed(a[key], random)
    found["manifest.json"] = json.dumps(manifest).encode()


def headed(found: Members, random: Random) -> None:
    """A field anywhere in the manifest changes."""
    manifest = json.loads(found["manifest.json"])
    at, key = random.choice([*_places(manifest)])
    at[key] = _changed(at[key], random)
    found["manifest.json"] = json.dumps(manifest).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _changed(value: Any, random: Random) -> Any:
    if type(value) is int and random.random() < 0.5:
        return value + random.choice([-64, -1, 1, 64])
    if isinstance(value, list) and value and random.random() < 0.5:
        return random.choice([value[1:], value + value[:1], value[::-1]])
    return random.choice(NUMBERS)


MEMBERS: list[Callable[[Members, Random], None]] = [missing, renamed, exchanged, copied, resized, edited, tabled, headed]


def damage(intact: bytes, parts: Members, path: Path, seed: int) -> str:
    """Write a damaged artefact to ``path``; what was done to it."""
    random = Random(seed)
    if random.random() < 0.4:
        change = random.choice(BYTES)
        path.write_bytes(change(intact, random))
        return change.__name__
    found, done = dict(parts), []
    for _ in range(random.choice([1, 1, 2])):
        step = random.choice(MEMBERS)
        try:
            step(found, random)
            done.append(step.__name__)
        except (KeyError, ValueError, UnicodeDecodeError):
            continue  # what it would change is gone
    write_archive(path, found)
    return "+".join(done)


class Opener:
    """Opens artefacts and runs them in a process of its own, so that a crash is seen."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, path: Path) -> str:
        """``refused`` (by an error of our own), ``ran``, ``signal N``, or what was raised instead. Signal 14: it hung."""
        if self._process is None:
            command = [sys.executable, __file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        if said := self._process.stdout.readline().strip():
            return said
        code, self._process = self._process.wait(), None
        return f"signal {-code}"

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def serve() -> None:
    """A line with what became of it for each line with a path."""
    inputs = torch.tensor([[3, 5, 7, 11]])
    for line in sys.stdin:
        said = "ran"
        signal.alarm(SECONDS)
        try:
            found = elision.load(line.strip(), threads=1)
            found.generate(inputs, max_new_tokens=3)
            found(inputs)
        except ElisionError:
            said = "refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"[:300].replace("\n", " ")
        signal.alarm(0)
        print(said, flush=True)


if __name__ == "__main__":
    serve()
