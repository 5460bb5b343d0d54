"""GPU code in an artefact: a file of machine code for every kernel and target, one description of all launches, their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from elision.errors import ArtefactError
from elision.ir.launch import Binary, DeviceCode, Kernel
from elision.ir.schedule import Buffer, Row, Schedule
from elision.runtime.archive import Archive

LAUNCHES = "kernels/gpu.json"


def member(target: str, kernel: str) -> str:
    """The name of a kernel's machine code: ``kernels/cuda-sm_90/gemv_1.cubin``, for AMD ``.hsaco``."""
    return f"kernels/{target.replace(':', '-')}/{kernel}.{'cubin' if target.startswith('cuda') else 'hsaco'}"


def members(code: DeviceCode) -> dict[str, bytes]:
    """The members that hold it."""
    binaries = {t: {n: _metadata(b) for n, b in found.items()} for t, found in code.binaries.items()}
    document = {
        "kernels": {n: asdict(k) for n, k in code.kernels.items()},
        "schedules": {e: {s: x.to_json() for s, x in each.items()} for e, each in code.schedules.items()},
        "hosts": code.hosts,
        "binaries": binaries,
    }
    files = {member(t, n): b.code for t, found in code.binaries.items() for n, b in found.items()}
    return {LAUNCHES: json.dumps(document, separators=(",", ":")).encode(), **files}


def _metadata(binary: Binary) -> dict[str, Any]:
    return {k: v for k, v in asdict(binary).items() if k != "code"}


def describe(code: DeviceCode, found: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest's entry: the targets, and the SHA-256 of every member."""
    return {"targets": list(code.binaries), "sha256": {n: hashlib.sha256(d).hexdigest() for n, d in found.items()}}


def is_description(value: Any) -> bool:
    """Whether a manifest's entry has that form; None: there is no GPU code."""
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {"targets", "sha256"} or not isinstance(value["sha256"], dict):
        return False
    targets, digests = value["targets"], value["sha256"]
    legal = isinstance(targets, list) and all(isinstance(t, str) and t.startswith(("cuda:", "hip:")) for t in targets)
    return legal and LAUNCHES in digests and all(isinstance(d, str) for d in digests.values())


def read(archive: Archive, entry: dict[str, Any]) -> DeviceCode:
    """The GPU code of an artefact. Raises ArtefactError if it is not what the compiler wrote."""
    for name, digest in entry["sha256"].items():
        if hashlib.sha256(archive[name]).hexdigest() != digest:
            raise ArtefactError(f"{archive.path}: {name} does not match the SHA-256 in the manifest: compile the model again")
    try:
        document = json.loads(bytes(archive[LAUNCHES]))
        kernels = {n: Kernel(**k) for n, k in document["kernels"].items()}
        schedules = {e: {s: _schedule(x) for s, x in each.items()} for e, each in document["schedules"].items()}
        hosts = {e: [(op, why) for op, why in ops] for e, ops in document["hosts"].items()}
        binaries = {
            target: {n: Binary(code=_code(archive, entry, target, n), **document["binaries"][target][n]) for n in kernels}
            for target in entry["targets"]
        }
        used = {row.kernel for each in schedules.values() for s in each.values() for row in s.rows if row.host < 0}
        if used - kernels.keys():
            raise KeyError(min(used - kernels.keys()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        text = f"{archive.path}: its {LAUNCHES} is not what the compiler writes ({err!r}): compile the model again"
        raise ArtefactError(text) from err
    return DeviceCode(kernels, schedules, hosts, binaries)


def _code(archive: Archive, entry: dict[str, Any], target: str, kernel: str) -> bytes:
    """Machine code whose hash the manifest states."""
    name = member(target, kernel)
    if name not in entry["sha256"]:
        raise KeyError(name)
    return bytes(archive[name])


def _schedule(document: dict[str, Any]) -> Schedule:
    found = Schedule(**document)
    found.buffers = [Buffer(**b) for b in document["buffers"]]
    found.rows = [Row(**{**row, "operands": _tuples(row["operands"])}) for row in document["rows"]]
    found.outputs = [_tuples(o) for o in document["outputs"]]
    found.caches = {n: (a, b) for n, (a, b) in document["caches"].items()}
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
