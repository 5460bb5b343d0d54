"""Native code in an artefact: its members, its entry in the manifest, and whether this processor can run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from elision.errors import ArtefactError, BadInput
from elision.ir.program import Program
from elision.ir.schedule import NativeCode
from elision.llvm.objects import functions
from elision.llvm.processor import LEVELS, host_features, host_level, machine, needs
from elision.runtime.archive import Archive
from elision.runtime.native.reading import read_schedules, state_types

OBJECT, SCHEDULES, SOURCE = "kernels/cpu.o", "kernels/cpu.json", "kernels/cpu.mlir"

#: MLIR text and feature level to an object file: what rebuilds code for another processor.
Rebuild = Callable[[str, str], bytes]


def members(native: NativeCode, program: Program) -> dict[str, bytes]:
    """The members that hold native code; beside it the types of the states that it was made for."""
    document = {
        "states": state_types(program),
        "signatures": native.signatures,
        "hosts": native.hosts,
        "schedules": {name: asdict(schedule) for name, schedule in native.schedules.items()},
    }
    return {OBJECT: native.code, SCHEDULES: json.dumps(document, separators=(",", ":")).encode(), SOURCE: native.text.encode()}


def describe(native: NativeCode, with_program: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest's entry: the processors it is for, and the SHA-256 of what belongs together."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in with_program.items()}
    return {"machine": native.machine, "level": native.level, "features": list(needs(native.level)), "sha256": digests}


def is_description(value: Any) -> bool:
    """Whether a manifest's entry has the form that `describe` gives it; None stands for an artefact without native code."""
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {"machine", "level", "features", "sha256"}:
        return False
    level, digests = value["level"], value["sha256"]
    legal = isinstance(value["machine"], str) and isinstance(level, str) and level in LEVELS
    legal = legal and value["features"] == list(needs(level)) and isinstance(digests, dict)
    return legal and {OBJECT, SCHEDULES, SOURCE, "program.txt"} == set(digests)


def read(
    archive: Archive, entry: dict[str, Any], program: Program, packings: Mapping[str, str], rebuild: Rebuild | None
) -> NativeCode:
    """The native code of an artefact, for this processor; ``rebuild`` makes it anew if it is for one that can do more.

    Raises ArtefactError if it cannot run here, or is not what the compiler wrote.
    """
    for name, digest in entry["sha256"].items():
        if hashlib.sha256(archive[name]).hexdigest() != digest:
            raise ArtefactError(f"{archive.path}: {name} does not match the SHA-256 in the manifest: compile the model again")
    found_machine, level, source = entry["machine"], entry["level"], bytes(archive[SOURCE]).decode()
    lacking = sorted({*entry["features"]} - host_features()) if found_machine == machine() else []
    if found_machine != machine() or lacking:
        code, level = _other(archive, entry, lacking, source, rebuild)
    else:
        code = bytes(archive[OBJECT])
    try:
        document = json.loads(bytes(archive[SCHEDULES]))
    except (ValueError, RecursionError) as err:
        raise ArtefactError(f"{archive.path}: its {SCHEDULES} is not JSON: {err}") from err
    schedules, hosts, signatures = read_schedules(document, program, packings, functions(code))
    return NativeCode(code, schedules, hosts, signatures, machine(), level, source)


def _other(
    archive: Archive, entry: dict[str, Any], lacking: list[str], source: str, rebuild: Rebuild | None
) -> tuple[bytes, str]:
    """Code for this processor from the source beside it. Raises ArtefactError where that cannot be."""
    there = f"{entry['level']} ({entry['machine']})"
    if entry["machine"] == machine() and rebuild is not None:
        try:
            return rebuild(source, host_level()), host_level()
        except BadInput as err:
            reason = str(err)
    else:
        reason = "and it cannot be made again here"
    here = f"which lacks {', '.join(lacking)}" if lacking else f"which is {machine()}"
    raise ArtefactError(
        f"{archive.path} has native code for {there}, not for this processor, {here}; {reason}: compile the model here, or run "
        'the interpreter with elision.load(path, target="reference")'
    )
