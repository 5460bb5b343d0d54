"""The artefact of a compiled model: the same tokens in a process that has no transformers, and nothing damaged is opened."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import elision
from elision.errors import ArtefactError, BadInput, ElisionError
from elision.runtime.archive import Archive, write_archive

IDS = torch.tensor([[3, 5, 7, 11]])


def tiny(target: str) -> elision.Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    source = transformers.AutoModelForCausalLM.from_config(config)
    for p in source.parameters():
        p.data.normal_(0, 1)
    return elision.compile(source, target=target)


@pytest.fixture(scope="module")
def model() -> elision.Model:
    return tiny("cpu")


@pytest.fixture(scope="module")
def path(model: elision.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artefact") / "tiny.elision"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact without native code: few bytes."""
    path = tmp_path_factory.mktemp("artefact") / "short.elision"
    tiny("reference").save(path)
    return path


def test_the_same_tokens_after_loading(model: elision.Model, path: Path) -> None:
    again = elision.load(path)
    assert torch.equal(again.generate(IDS, max_new_tokens=12), model.generate(IDS, max_new_tokens=12))
    sampled = dict(max_new_tokens=12, temperature=1.5, seed=3)
    assert torch.equal(again.generate(IDS, **sampled), model.generate(IDS, **sampled))
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.report == model.report


def test_saving_what_was_loaded_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    elision.load(path).save(tmp_path / "again.elision")
    assert (tmp_path / "again.elision").read_bytes() == path.read_bytes()


def test_a_process_without_transformers(model: elision.Model, path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('transformers', 'networkx'): sys.modules[name] = None\n"
        "import torch\n"
        "from elision.runtime.artefact import load\n"
        f"print(load({str(path)!r}).generate(torch.tensor({IDS.tolist()}), max_new_tokens=12).tolist())\n"
        "assert not [m for m in sys.modules if m.startswith(('elision.frontend', 'elision.passes', 'elision.codegen'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == model.generate(IDS, max_new_tokens=12).tolist()


def test_every_flipped_bit_is_refused(short: Path, tmp_path: Path) -> None:
    good, bad = short.read_bytes(), tmp_path / "bad.elision"
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 1 << place % 8  # test_archive flips all eight bits of every byte of a smaller one
        bad.write_bytes(damaged)
        with pytest.raises(ElisionError):
            Archive.open(bad)
    for place in range(0, len(good), max(1, len(good) // 40)):
        damaged = bytearray(good)
        damaged[place] ^= 0x10
        bad.write_bytes(damaged)
        with pytest.raises(ArtefactError):
            elision.load(bad)


def test_every_truncation_is_refused(short: Path, tmp_path: Path) -> None:
    good, bad = short.read_bytes(), tmp_path / "bad.elision"
    for size in [*range(0, len(good), 97), len(good) - 1]:
        bad.write_bytes(good[:size])
        with pytest.raises(ArtefactError):
            elision.load(bad)


def test_unverified_loading_skips_the_weights_only(path: Path, tmp_path: Path) -> None:
    good, bad = path.read_bytes(), tmp_path / "bad.elision"
    archive = Archive.open(path)
    weights = good.index(bytes(archive["weights.bin"]))
    for place, legal in ((weights + 100, True), (good.index(b"def step"), False), (good.index(b'"max_context"'), False)):
        damaged = bytearray(good)
        damaged[place] ^= 1
        bad.write_bytes(damaged)
        with pytest.raises(ArtefactError):
            elision.load(bad)
        if legal:
            elision.load(bad, verify=False)
        else:
            with pytest.raises(ArtefactError):
                elision.load(bad, verify=False)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(pickle.dumps({"weights": [1, 2, 3]})),
        lambda p: torch.save({"w": torch.ones(3)}, p),
        lambda p: zipfile.ZipFile(p, "w").writestr("manifest.json", "{}"),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("program(name='x')"),
    ],
)
def test_foreign_files_are_refused(write: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "foreign.elision"
    write(path)
    with pytest.raises(ArtefactError):
        elision.load(path)


def rebuilt(path: Path, to: Path, change: Callable[[dict[str, Any]], Any], text: Callable[[str], str] = lambda t: t) -> Path:
    """The artefact with another manifest or program, and digests that fit."""
    archive = Archive.open(path)
    members = {name: bytes(archive[name]) for name in archive}
    manifest = json.loads(members["manifest.json"])
    changed = change(manifest)
    members["manifest.json"] = json.dumps(manifest if changed is None else changed).encode()
    members["program.txt"] = text(members["program.txt"].decode()).encode()
    write_archive(to, members)
    return to


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format=1), "format version 1"),
        (lambda m: {k: v for k, v in m.items() if k != "format"}, "format version"),
        (lambda m: {k: v for k, v in m.items() if k != "tensors"}, "fields"),
        (lambda m: m.update(extra=1), "fields"),
        (lambda m: [], "format version"),
        (lambda m: m.update(tensors=[]), "bytes"),
        (lambda m: m["tensors"][0].update(dtype="object"), "dtype"),
        (lambda m: m["tensors"][0].update(name="other"), "missing"),
        (lambda m: m["tensors"][0].update(dtype="int32"), "not of the type"),
        (lambda m: m.update(max_context="long"), "max_context"),
        (lambda m: m.update(max_batch=0), "max_batch"),
        (lambda m: m.update(defaults=[]), "defaults"),
        (lambda m: m.update(coverage=7), "coverage"),
        (lambda m: m["coverage"].update(left=[]), "coverage"),
        (lambda m: m["coverage"]["entries"].update(step="many"), "coverage"),
        (lambda m: m["coverage"]["flops"].update(step=2.0), "coverage"),
        (lambda m: m.update(text=True), "tokenizer.json"),
    ],
)
def test_hostile_manifests_are_refused(change: Callable[[Any], Any], says: str, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=says):
        elision.load(rebuilt(path, tmp_path / "x.elision", change))


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.replace("version=1", "version=2", 1),
        lambda t: t.replace("linear(", "os_system(", 1),
        lambda t: t.replace("kv_0", "kv_9", 1),
        lambda t: t[: len(t) // 2],
        lambda t: t.replace("heads=1", "heads=3", 1),
        lambda t: t.replace("def step(", "def stride(", 1),
    ],
)
def test_hostile_programs_are_refused(edit: Callable[[str], str], path: Path, tmp_path: Path) -> None:
    with pytest.raises(ElisionError):
        elision.load(rebuilt(path, tmp_path / "x.elision", lambda m: None, edit))


def test_saving_fails_without_leaving_anything(model: elision.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elision.runtime import artefact

    def broken(*_: Any) -> Any:
        raise OSError("disk full")

    with pytest.raises(BadInput):
        model.save(tmp_path / "no" / "folder" / "x.elision")
    monkeypatch.setattr(artefact, "print_program", broken)
    with pytest.raises(OSError, match="disk full"):
        model.save(tmp_path / "x.elision")
    assert list(tmp_path.iterdir()) == []
