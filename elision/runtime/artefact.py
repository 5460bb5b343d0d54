"""The artefact: a compiled model in one file, and how it is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from elision.errors import ArtefactError, BadInput, IllegalProgram
from elision.ir.coverage import is_report
from elision.ir.layout import nbytes
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.program import QUALITIES, Program
from elision.ir.types import DTYPES
from elision.ir.verifier import verify as verify_program
from elision.runtime.archive import Archive, write_archive
from elision.runtime.tensors import pack_tensors, unpack_tensors
from elision.runtime.text import Tokenizer

if TYPE_CHECKING:
    from elision.runtime.model import Model

FORMAT = 1


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


#: The manifest's fields, and what each must be.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda v: v == FORMAT,
    "name": lambda v: isinstance(v, str),
    "passes": lambda v: isinstance(v, list) and all(isinstance(p, str) for p in v),
    "quality": lambda v: v in QUALITIES,
    "targets": lambda v: v == ["reference"],
    "coverage": is_report,
    "state_bytes": lambda v: isinstance(v, dict),
    "tensors": lambda v: isinstance(v, list),
    "defaults": lambda v: isinstance(v, dict),
    "max_context": _is_count,
    "max_batch": _is_count,
    "text": lambda v: isinstance(v, bool),
}


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write ``model`` to ``path``, all of it or nothing."""
    table, chunks = pack_tensors(model.weights)
    program = model.program
    manifest = {
        "format": FORMAT,
        "name": program.name,
        "passes": list(program.applied),
        "quality": program.quality,
        "targets": ["reference"],
        "coverage": model.coverage,
        "state_bytes": {n: nbytes(t, 1, model.max_context) for n, t in program.states.items()},
        "tensors": table,
        "defaults": model.defaults,
        "max_context": model.max_context,
        "max_batch": model.max_batch,
        "text": model.tokenizer is not None,
    }
    text = model.tokenizer.to_members() if model.tokenizer is not None else {}
    members: dict[str, Any] = {
        "manifest.json": json.dumps(manifest, indent=1).encode(),
        "program.txt": print_program(program).encode(),
        **text,
        "weights.bin": chunks,
    }
    write_archive(path, members)


def load(path: str | os.PathLike[str], threads: int | None = None, verify: bool = True) -> Model:
    """Open an artefact; its weights are mapped, not read. ``verify=False`` skips the check of the weights' bytes only.

    Raises BadInput for a file that is not there, ArtefactError for one that is damaged, foreign or of another version.
    """
    from elision.runtime.model import Model

    archive = Archive.open(path, verify)
    manifest = _manifest(archive)
    tokenizer = None
    if manifest["text"]:
        tokenizer = Tokenizer.from_json(bytes(archive["tokenizer.json"]), _json(archive, "text.json"))
    program = _program(archive)
    weights = unpack_tensors(manifest["tensors"], archive["weights.bin"])
    for name, type in program.params.items():
        found = weights.get(name)
        if found is None or (tuple(found.shape), found.dtype) != type.storage:
            raise ArtefactError(f"{path}: the weight {name} is missing or not of the type {type}")
    return Model(
        program,
        weights,
        tokenizer=tokenizer,
        defaults=manifest["defaults"],
        coverage=manifest["coverage"],
        max_context=manifest["max_context"],
        max_batch=manifest["max_batch"],
        threads=threads,
    )


def _json(archive: Archive, member: str) -> Any:
    try:
        return json.loads(bytes(archive[member]))
    except (ValueError, RecursionError) as err:
        raise ArtefactError(f"{archive.path}: its {member} is not JSON: {err}") from err


def _manifest(archive: Archive) -> dict[str, Any]:
    manifest = _json(archive, "manifest.json")
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ArtefactError(f"{archive.path}: the manifest does not say its format version")
    if manifest["format"] != FORMAT:
        raise ArtefactError(
            f"{archive.path} has format version {manifest['format']!r}, this Elision reads {FORMAT}: compile the model again"
        )
    if set(manifest) != set(_FIELDS):
        raise ArtefactError(f"{archive.path}: the manifest has not the fields {', '.join(sorted(_FIELDS))}")
    for name, legal in _FIELDS.items():
        if not legal(manifest[name]):
            raise ArtefactError(f"{archive.path}: the manifest's {name} cannot be {manifest[name]!r:.80}")
    return manifest


def _program(archive: Archive) -> Program:
    """The program, read back and verified: what was legal when it was written must be legal still."""
    try:
        program = parse_program(bytes(archive["program.txt"]).decode())
        verify_program(program)
    except (BadInput, IllegalProgram, UnicodeDecodeError) as err:
        raise ArtefactError(f"{archive.path}: the program cannot be read: {err}; write the artefact anew") from err
    missing = {"outputs", "vocab", "dtype"} - set(program.meta)
    if missing or "score" not in program.entries or program.meta["dtype"] not in DTYPES:
        raise ArtefactError(f"{archive.path}: the program is not a whole model: write the artefact anew")
    return program
