"""The artefact: a compiled model in one file, and how it is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from elision.errors import ArtefactError, BadInput, IllegalProgram
from elision.ir.coverage import is_report
from elision.ir.layout import nbytes
from elision.ir.packing import packed_bytes, packing_of
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.program import QUALITIES, Program
from elision.ir.types import DTYPES, Tensor
from elision.ir.verifier import verify as verify_program
from elision.runtime.archive import Archive, write_archive
from elision.runtime.cuda import artefact as device_code
from elision.runtime.cuda.driver import Cuda
from elision.runtime.native import artefact as native_code
from elision.runtime.native.weights import PackedWeights
from elision.runtime.tensors import pack_tensors, packings, unpack_tensors
from elision.runtime.text import Tokenizer

if TYPE_CHECKING:
    from elision.runtime.model import Model

FORMAT = 6


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


#: The manifest's fields, and what each must be.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda v: v == FORMAT,
    "name": lambda v: isinstance(v, str),
    "passes": lambda v: isinstance(v, list) and all(isinstance(p, str) for p in v),
    "quality": lambda v: v in QUALITIES,
    "targets": lambda v: isinstance(v, list) and v[:1] in (["cpu"], ["reference"]),
    "native": native_code.is_description,
    "device": device_code.is_description,
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
    packed = model.weights if isinstance(model.weights, PackedWeights) else None
    table, chunks = pack_tensors(packed.stored, packed.packings) if packed else pack_tensors(model.weights)
    program = model.program
    code = {"program.txt": print_program(program).encode()}
    if model.native is not None:
        code |= native_code.members(model.native, model.program)
    kernels = device_code.members(model.gpu) if model.gpu is not None else {}
    manifest = {
        "format": FORMAT,
        "name": program.name,
        "passes": list(program.applied),
        "quality": program.quality,
        "targets": ["reference" if model.native is None else "cpu", *(model.gpu.binaries if model.gpu else ())],
        "native": None if model.native is None else native_code.describe(model.native, code),
        "device": None if model.gpu is None else device_code.describe(model.gpu, kernels),
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
        **code,
        **kernels,
        **text,
        "weights.bin": chunks,
    }
    write_archive(path, members)


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    verify: bool = True,
    target: str | None = None,
    rebuild: native_code.Rebuild | None = None,
    device: str | None = None,
) -> Model:
    """Open an artefact; its weights are mapped, not read. ``verify=False`` skips the check of the weights' bytes only.

    ``target``: ``"cpu"`` for native code, ``"reference"`` for the interpreter on unpacked weights; None takes what the artefact
    has. ``rebuild`` (MLIR text and feature level to an object file) is asked where its code needs another processor. ``device``:
    ``"cuda"`` for the first GPU of this process, on which the model generates.

    Raises BadInput for a file that is not there, ArtefactError for one that is damaged, foreign, of another version, or without
    code for this processor.
    """
    from elision.runtime.model import Model

    if target not in (None, "cpu", "reference"):
        raise BadInput(f"unknown target {target!r}; expected cpu, reference or None for what the artefact has")
    if device not in (None, "cpu", "cuda") or (device == "cuda" and target is not None):
        raise BadInput(f"device={device!r}, target={target!r}; expected cpu, or cuda without a target")
    archive = Archive.open(path, verify)
    manifest = _manifest(archive)
    tokenizer = None
    if manifest["text"]:
        tokenizer = Tokenizer.from_json(bytes(archive["tokenizer.json"]), _json(archive, "text.json"))
    program = _program(archive)
    stored = unpack_tensors(manifest["tensors"], archive["weights.bin"])
    how = packings(manifest["tensors"])
    for name, type in program.params.items():
        if name not in stored or not _is_stored(stored[name], how[name], type):
            raise ArtefactError(f"{path}: the weight {name} is missing or not of the type {type}")
    weights: Mapping[str, torch.Tensor] = PackedWeights(program, {name: stored[name] for name in program.params}, how)
    native = None
    gpu = device_code.read(archive, manifest["device"]) if manifest["device"] is not None else None
    if device == "cuda" and gpu is None:
        raise ArtefactError(f"{path} has no code for GPUs: compile the model again with target='cuda:sm_90', for example")
    if target != "reference" and device != "cuda" and manifest["native"] is not None:
        native = native_code.read(archive, manifest["native"], program, how, rebuild)
    elif target == "cpu":
        raise ArtefactError(f"{path} has no native code, only the target reference: compile the model again with target='cpu'")
    else:
        weights = dict(weights)
    return Model(
        program,
        weights,
        tokenizer=tokenizer,
        defaults=manifest["defaults"],
        coverage=manifest["coverage"],
        max_context=manifest["max_context"],
        max_batch=manifest["max_batch"],
        threads=threads,
        native=native,
        gpu=gpu,
        device=Cuda(gpu) if device == "cuda" and gpu is not None else None,
    )


def _is_stored(found: torch.Tensor, packing: str, type: Tensor) -> bool:
    """Whether a stored tensor is a weight of this type in that packing."""
    if packing == "plain":
        return (tuple(found.shape), found.dtype) == type.storage
    legal = type.dtype == "f32" and len(type.axes) > 1 and packing == packing_of(type.encoding, type.row)
    return legal and (found.dim(), found.dtype) == (1, torch.uint8) and len(found) == packed_bytes(packing, type.sizes)


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
    if (manifest["native"] is None) != (manifest["targets"][:1] == ["reference"]):
        raise ArtefactError(f"{archive.path}: the manifest's targets and native code do not agree")
    if manifest["targets"][1:] != (manifest["device"] or {"targets": []})["targets"]:
        raise ArtefactError(f"{archive.path}: the manifest's targets and code for GPUs do not agree")
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
