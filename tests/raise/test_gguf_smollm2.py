"""SmolLM2 from its GGUF file: the model that transformers' own reader gives, to the last bit, and without its dependencies."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf_families import tiny
from gguf_files import real_file, write_model
from transformers import AutoModelForCausalLM

from elision.errors import BadInput
from elision.frontend.source import Source, load_source


@pytest.fixture(scope="module")
def source() -> Source:
    return load_source("smollm2")


def test_the_model_is_the_one_that_transformers_reads(source: Source) -> None:
    path = real_file()
    expected = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    found, weights = source.model.state_dict(), expected.state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    tokens = torch.randint(0, 49152, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(source.model(tokens).logits, expected(tokens).logits)
    ours, theirs = source.model.config.to_dict(), expected.config.to_dict()
    unused = {"_name_or_path", "_model_name_or_path", "quantization_config", "unk_token_id"}
    assert {k: v for k, v in ours.items() if k not in unused} == {k: v for k, v in theirs.items() if k not in unused}
    assert source.model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_blocks_stay_within_reach(source: Source) -> None:
    """Of all weights: their formats, their bytes as in the file, and the order of rows that llama.cpp changed."""
    parameters = dict(source.model.named_parameters())
    assert source.stored.keys() == parameters.keys()
    formats = [blocks.format for blocks in source.stored.values()]
    assert {name: formats.count(name) for name in set(formats)} == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
    assert {name.split(".")[-2] for name, blocks in source.stored.items() if blocks.rows is not None} == {"q_proj", "k_proj"}
    for name in ("model.layers.3.self_attn.k_proj.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(source.stored[name].decode(), parameters[name])


def test_source_settings(source: Source) -> None:
    assert source.name == "smollm2" and source.positions == 8192
    assert (source.defaults["eos_token_id"], source.defaults["pad_token_id"]) == (2, 2)


def test_neither_gguf_nor_accelerate_is_needed() -> None:
    code = """
import importlib.util, sys
hidden, real = ("gguf", "accelerate"), importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] in hidden else real(name, *rest)
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
from elision.frontend.source import load_source
source = load_source("smollm2")
assert source.tokenizer and not any(name in sys.modules for name in hidden)
print(float(source.model.model.norm.weight.sum()))
"""
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert found.returncode == 0 and float(found.stdout) > 0, found.stderr


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copyfile(real_file(), path)
    with open(path, "r+b") as file:
        file.truncate(50_000_000)
    with pytest.raises(BadInput, match=r"tensor 'blk\.\d+\.\w+\.weight' ends at byte \d+ of 50000000: the file is cut off"):
        load_source(path)
    path.write_text("no model")
    with pytest.raises(BadInput, match="m.gguf is not a readable GGUF file: it starts with b'no m'"):
        load_source(path)
    with pytest.raises(BadInput, match="missing.gguf' does not exist"):
        load_source(tmp_path / "missing.gguf")


def test_a_configuration_that_transformers_refuses_is_named(tmp_path: Path) -> None:
    architecture, model = tiny("llama")
    write_model(tmp_path / "m.gguf", architecture, model, {"attention.head_count_kv": 3, "rope.dimension_count": 16})
    with pytest.raises(BadInput, match="m.gguf"):
        load_source(tmp_path / "m.gguf")


def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    architecture, model = tiny("llama")
    tokens = ["a"] * 128
    write_model(tmp_path / "m.gguf", architecture, model, {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens})
    with caplog.at_level(logging.WARNING, "elision"):
        assert load_source(tmp_path / "m.gguf").tokenizer is None
    assert "tokenizers of the kind 'bert' cannot be read" in caplog.text and "give token ids, not text" in caplog.text
    caplog.clear()
    write_model(tmp_path / "m.gguf", architecture, model)
    with caplog.at_level(logging.WARNING, "elision"):
        assert load_source(tmp_path / "m.gguf").tokenizer is None
    assert not caplog.records


def test_every_token_that_ends_a_turn_ends_a_text(tmp_path: Path) -> None:
    """Llama 3 files name one end; its chat ends with another, which llama.cpp knows by its text."""
    architecture, model = tiny("llama")
    tokens = ["<a>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"] + [f"t{i}" for i in range(124)]
    kinds = [3, 3, 3, 1] + [1] * 124
    texts = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": [0.0] * 128, "eos_token_id": 1, "bos_token_id": 0}
    write_model(tmp_path / "m.gguf", architecture, model, {f"tokenizer.ggml.{key}": value for key, value in texts.items()})
    assert load_source(tmp_path / "m.gguf").defaults["eos_token_id"] == [1, 2]
