"""Native code in artefacts: opened without a compiler, refused or made again elsewhere, never trusted where it is damaged."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import elision
from elision.errors import ArtefactError, BadInput
from elision.ir.states import Int
from elision.llvm.processor import LEVELS, host_level, needs
from elision.runtime import artefact
from elision.runtime.archive import Archive, write_archive
from elision.runtime.native import artefact as native_code
from elision.runtime.native.weights import PackedWeights

IDS = torch.tensor([[3, 5, 7, 11]])

CONFIG = LlamaConfig(
    vocab_size=24, hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=32, tie_word_embeddings=True, initializer_range=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> elision.Model:
    torch.manual_seed(0)
    return elision.compile(LlamaForCausalLM(CONFIG))


@pytest.fixture(scope="module")
def path(model: elision.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "tiny.elision"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def tokens(model: elision.Model) -> list[list[int]]:
    return model.generate(IDS, max_new_tokens=12).tolist()  # type: ignore[no-any-return]


def test_a_cache_of_bytes(model: elision.Model, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = elision.compile(LlamaForCausalLM(CONFIG), passes=["insert-cache:dtype=int8"])
    with pytest.raises(BadInput, match="give one of the two"):
        elision.compile(LlamaForCausalLM(CONFIG), passes=["insert-cache:dtype=int8"], kv_dtype="bfloat16")
    made.save(tmp_path / "bytes.elision")
    again = elision.load(tmp_path / "bytes.elision")
    assert again.native is not None and not any(again.native.hosts.values())
    assert again.program.states == made.program.states != model.program.states and again.program.quality == "approximate"
    kinds = {type(e) for s in again.program.states["kv_0"].segments for e in (s.k, s.v)}  # type: ignore[union-attr]
    assert kinds == {Int} and again.report["state_bytes"] < model.report["state_bytes"]
    tokens = made.generate(IDS, max_new_tokens=12)
    assert torch.equal(again.generate(IDS, max_new_tokens=12), tokens)
    assert elision.load(tmp_path / "bytes.elision", target="reference").generate(IDS, max_new_tokens=12).shape == tokens.shape


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(bytes(Archive.open(path)["manifest.json"]))  # type: ignore[no-any-return]


def test_the_manifest_says_what_the_code_is_for(path: Path) -> None:
    found = manifest(path)
    assert found["targets"] == ["cpu"] and found["native"]["level"] == host_level()
    assert found["native"]["features"] == list(needs(host_level()))
    assert "panel:f32" in {row["packing"] for row in found["tensors"]}


def test_weights_are_mapped_as_they_are(model: elision.Model, path: Path) -> None:
    again = elision.load(path)
    assert isinstance(again.weights, PackedWeights) and isinstance(model.weights, PackedWeights)
    archive = Archive.open(path)
    for name, data in model.weights.stored.items():
        assert again.weights.address(name) % 64 == 0
        assert torch.equal(again.weights.stored[name], data)
        assert torch.equal(again.weights[name], model.weights[name])
    first = min(again.weights.address(n) for n in again.weights)
    last = max(again.weights.address(n) for n in again.weights)
    assert last - first < len(archive["weights.bin"]), "they lie in one mapping"


def test_without_compiler_frontend_and_path(path: Path, tokens: list[list[int]]) -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'networkx', 'mlir'): sys.modules[name] = None\n"
        "import torch, elision\n"
        "before = {m for m in sys.modules if m.startswith('torch.export')}\n"
        f"m = elision.load({str(path)!r})\n"
        f"print(m.generate(torch.tensor({IDS.tolist()}), max_new_tokens=12).tolist(), m.native.level)\n"
        "assert not [m for m in sys.modules if m.startswith(('elision.frontend', 'elision.passes', 'elision.codegen'))]\n"
        "assert before == {m for m in sys.modules if m.startswith('torch.export')}"
    )
    env = {"PATH": "", "PYTHONPATH": str(Path(elision.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{tokens} {host_level()}"


def test_code_for_a_better_processor_is_refused_or_made_again(
    path: Path, tokens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    level = host_level()
    names = [name for name in LEVELS if name.startswith("x86-64")]
    lower = dict(zip(names, names[1:], strict=False)).get(level)
    less = frozenset(needs(lower)) if lower is not None else frozenset()
    for module in ("elision.llvm.processor", "elision.runtime.native.artefact"):
        monkeypatch.setattr(f"{module}.host_features", lambda: less)
    lacks = sorted({*needs(level)} - less)[0]
    with pytest.raises(ArtefactError, match=rf"{re.escape(level)}.*lacks {lacks}.*target=\"reference\""):
        artefact.load(path)
    assert artefact.load(path, target="reference").generate(IDS, max_new_tokens=12).tolist() == tokens
    if lower is not None:
        again = elision.load(path)
        assert again.native is not None and again.native.level == lower
        assert again.generate(IDS, max_new_tokens=12).tolist() == tokens
    monkeypatch.setattr(native_code, "machine", lambda: "z80 CP/M")
    with pytest.raises(ArtefactError, match=r"(x86_64|aarch64).*z80 CP/M"):
        elision.load(path)


def test_targets_that_are_not_there(path: Path, tmp_path: Path) -> None:
    with pytest.raises(elision.BadInput, match="unknown target"):
        elision.load(path, target="tpu")
    plain = elision.load(path, target="reference")
    plain.save(tmp_path / "plain.elision")
    assert manifest(tmp_path / "plain.elision")["native"] is None
    with pytest.raises(ArtefactError, match="no native code"):
        elision.load(tmp_path / "plain.elision", target="cpu")


def changed(path: Path, to: Path, name: str, data: bytes, *, settle: bool) -> Path:
    """The artefact with another member; ``settle``: with the digest in the manifest that fits it."""
    archive = Archive.open(path)
    members = {n: bytes(archive[n]) for n in archive}
    members[name] = data
    if settle:
        found = json.loads(members["manifest.json"])
        found["native"]["sha256"][name] = hashlib.sha256(data).hexdigest()
        members["manifest.json"] = json.dumps(found).encode()
    write_archive(to, members)
    return to


@pytest.mark.parametrize("name", [native_code.OBJECT, native_code.SCHEDULES, native_code.SOURCE])
def test_members_that_the_manifest_does_not_mean_are_refused(name: str, path: Path, tmp_path: Path) -> None:
    data = bytearray(Archive.open(path)[name])
    data[len(data) // 2] ^= 1
    bad = changed(path, tmp_path / "x.elision", name, bytes(data), settle=False)
    for verify in (True, False):
        with pytest.raises(ArtefactError, match=f"{name} does not match"):
            elision.load(bad, verify=verify)


def test_an_object_of_another_kind_is_refused(path: Path, tmp_path: Path) -> None:
    for data in (b"", b"\x7fELF", b"no object", bytes(Archive.open(path)["program.txt"])):
        with pytest.raises(ArtefactError, match="object"):
            elision.load(changed(path, tmp_path / "x.elision", native_code.OBJECT, data, settle=True))


def leaves(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places of everything in a document."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((*above, key), *leaves(value[key], (*above, key)))]


def test_edited_schedules_are_refused_or_have_only_other_numbers(path: Path, tmp_path: Path) -> None:
    """300 edits with digests that fit. What kernels take as plain numbers is all that may differ."""
    document = json.loads(bytes(Archive.open(path)[native_code.SCHEDULES]))
    places, draw = leaves(document), random.Random(0)
    values = [None, -1, 0, 1, 7, 2**40, 2**70, 1.5, "x", "system", [], {}, True, ["weight", "x"], ["tensor", 99, 0, 4]]
    archive = Archive.open(path)
    program, how = artefact._program(archive), artefact.packings(manifest(path)["tensors"])
    kernels = native_code.functions(bytes(archive[native_code.OBJECT]))
    refused = 0
    for i in range(300):
        place, value = draw.choice(places), draw.choice(values)
        edited = copy.deepcopy(document)
        field = edited
        for key in place[:-1]:
            field = field[key]
        old, field[place[-1]] = field[place[-1]], value
        if i < 10:
            bad = changed(path, tmp_path / "x.elision", native_code.SCHEDULES, json.dumps(edited).encode(), settle=True)
            assert Archive.open(bad)  # intact as an archive
        try:
            native_code.read_schedules(edited, program, how, kernels)
        except ArtefactError:
            refused += 1
            continue
        same = type(old) is type(value) and old == value
        number = "rows" in place and isinstance(field, list) and bool(field) and field[0] in ("int", "float", "tensor", "axis")
        free = place[-1] in ("label", "barrier", "slot", "width", "private", "axis") or "outputs" in place or "inputs" in place
        names = place[0] in ("hosts", "signatures") or "packings" in place or place[2:3] == ("axes",) and isinstance(value, str)
        assert same or number or free or names, (place, old, value)
    assert refused > 150
