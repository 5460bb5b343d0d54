"""How weights are stored: the numbers of the decoded weights in fewer bytes, also after saving; and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import elision
from elision.cli.opening import with_passes
from elision.errors import ArtefactError, BadInput
from elision.ir.retype import convert
from elision.passes import Int4Weights, Int8Weights, from_text
from elision.runtime.archive import Archive, write_archive

IDS = torch.tensor([[3, 5, 7, 11, 2], [9, 1, 30, 4, 4]])
PASSES = ["int8:group=32", "int8:group=row", "int8:group=16", "int4:group=32", "int4:group=8", "bf16"]
BYTES = {"int8:group=32": 34 / 32, "int8:group=row": 66 / 64, "int4:group=32": 20 / 32, "bf16": 2.0}


@cache
def source(family: str = "llama", tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    if family == "mixtral":
        config: transformers.PretrainedConfig = transformers.MixtralConfig(**sizes, num_local_experts=4)
    else:
        config = transformers.LlamaConfig(**sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@cache
def plain(family: str = "llama") -> elision.Model:
    return elision.compile(source(family))


def stored(*passes: str, family: str = "llama") -> elision.Model:
    """The model with these passes applied to its compiled program."""
    return with_passes(plain(family), passes)


def decoded(model: elision.Model) -> elision.Model:
    """The floats of the model's encoded weights, in the program that has no encodings."""
    again = plain("mixtral" if any("experts" in n for n in model.weights) else "llama")
    weights = {
        name: t.encoding.decode(model.weights[name], t.row) if (t := model.program.params[name]).encoding else model.weights[name]
        for name in again.weights
    }
    return elision.Model(again.program, weights, tokenizer=None, defaults=again.defaults, coverage={}, max_context=64)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("text", PASSES)
def test_logits_are_those_of_the_decoded_weights(text: str, family: str) -> None:
    model = stored(text, family=family)
    again, exact = decoded(model), plain(family)
    logits = model(IDS).logits
    assert torch.equal(logits, again(IDS).logits) and not torch.equal(logits, exact(IDS).logits)
    assert torch.equal(model.generate(IDS, max_new_tokens=8), again.generate(IDS, max_new_tokens=8))
    assert model.report["quality"] == "approximate" and model.report["passes"][-1] == from_text(text).text()
    error = (logits - exact(IDS).logits).abs().max() / exact(IDS).logits.abs().max()
    if family == "llama" and "int4" not in text:  # rounding may send a token to another expert
        assert float(error) < 0.05


def test_compiling_with_a_pass_is_the_same() -> None:
    model, again = elision.compile(source(), passes=["int4:group=32"]), stored("int4:group=32")
    assert model.program == again.program
    assert all(torch.equal(w, again.weights[n]) for n, w in model.weights.items())


@pytest.mark.parametrize("text", BYTES)
def test_bytes_are_those_of_the_encoding(text: str) -> None:
    """Of everything but norms and frequencies; the tied table is there once."""
    exact, model = plain(), stored(text)
    elements = {n: w.numel() for n, w in exact.weights.items()}
    matrices = [n for n, w in exact.weights.items() if w.dim() > 1]
    assert {n for n, t in model.program.params.items() if t.encoding is not None} == set(matrices)
    floats = sum(4 * elements[n] for n in elements if n not in matrices)
    assert exact.report["weight_bytes"] == 4 * sum(elements.values())
    assert model.report["weight_bytes"] == floats + sum(elements[n] for n in matrices) * BYTES[text]
    read, before = model.report["step"]["weight_bytes"], exact.report["step"]["weight_bytes"]
    assert before * BYTES[text] / 4 < read < before * BYTES[text] / 4 + 2 * floats  # frequencies are read by every layer


@pytest.mark.parametrize("text", ["int8:group=row", "int4:group=32"])
def test_an_artefact_holds_encoded_weights(text: str, tmp_path: Path) -> None:
    model = stored(text, family="mixtral")
    model.save(tmp_path / "m.elision")
    again = elision.load(tmp_path / "m.elision")
    assert again.report == model.report and again.program == model.program
    assert all(torch.equal(again.weights[n], w) and again.weights[n].dtype == w.dtype for n, w in model.weights.items())
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    plain("mixtral").save(tmp_path / "plain.elision")
    assert (tmp_path / "m.elision").stat().st_size < 0.45 * (tmp_path / "plain.elision").stat().st_size


def test_an_artefact_with_other_encodings_than_bytes_is_refused(tmp_path: Path) -> None:
    stored("int8:group=32").save(tmp_path / "m.elision")
    archive = Archive.open(tmp_path / "m.elision")
    members = {name: bytes(archive[name]) for name in ("manifest.json", "program.txt", "weights.bin")}
    text = members["program.txt"].decode()
    for old, new, says in (
        (" in int8(group=32)", " in int4(group=32)", "missing or not of the type .* in int4"),
        (" in int8(group=32)", " in int8(group=64)", "missing or not of the type"),
        (" in int8(group=32)", "", "missing or not of the type"),
        (" in int8(group=32)", " in int8(group=24)", "is not whole blocks"),
        (" in int8(group=32)", " in int9(group=32)", "unknown encoding"),
    ):
        assert old in text
        write_archive(tmp_path / "bad.elision", {**members, "program.txt": text.replace(old, new).encode()})
        with pytest.raises(ArtefactError, match=says):
            elision.load(tmp_path / "bad.elision")


def test_damaged_blocks_are_refused(tmp_path: Path) -> None:
    stored("int4").save(tmp_path / "m.elision")
    data = bytearray((tmp_path / "m.elision").read_bytes())
    at = data.index(b"weights.bin") + 400
    data[at] ^= 1
    (tmp_path / "m.elision").write_bytes(data)
    with pytest.raises(ArtefactError):
        elision.load(tmp_path / "m.elision")


def test_an_open_artefact_can_be_encoded(tmp_path: Path) -> None:
    plain().save(tmp_path / "m.elision")
    found = with_passes(elision.load(tmp_path / "m.elision"), ["int8"])
    assert torch.equal(found(IDS).logits, stored("int8")(IDS).logits)
    with pytest.raises(BadInput, match=r"int4: nothing to store in int4\(group=32\): llama has no float weights"):
        with_passes(found, ["int4"])


def test_with_other_passes() -> None:
    """Layers that are left out take their weights along."""
    less = elision.compile(source(), passes=["int8", "skip-layers:layers=1"])
    assert less.program.applied == ("insert-cache", "skip-layers:layers=1", "int8")
    assert not any(".layers.1." in n for n in less.weights)


def test_rows_that_are_no_whole_groups_stay() -> None:
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    model = elision.compile(transformers.LlamaForCausalLM(config).eval(), passes=["int8", "bf16"])
    found = {n.split(".")[-2]: str(t.encoding) for n, t in model.program.params.items() if n.endswith("_proj.weight")}
    assert found["down_proj"] == "BF16" and found["up_proj"] == "int8(group=32)"


def test_what_cannot_be_encoded_is_told() -> None:
    for passes, says in (
        (["stored"], "stored: the weights of llama did not come in blocks; expected a quantised GGUF file"),
        (["int4:group=100"], r"llama has 22 float weights, as f32\[64, 64\]"),
        (["int8:group=0"], "expected a group of at least 1"),
        (["int8:group=column"], "group='column'; expected a number of weights, or row"),
        (["int4:group=row"], "group='row' is not of the expected type"),
        (["int4:group=3"], "expected an even group"),
    ):
        with pytest.raises(BadInput, match=says):
            stored(*passes)
    broken = {n: w * torch.nan for n, w in plain().weights.items()}
    program = stored("int8").program
    with pytest.raises(BadInput, match=r"proj\.weight: int8\(group=32\) cannot hold numbers that are not finite"):
        convert(broken, plain().program.params, program.params)


def test_bfloat16_models() -> None:
    """Activations and what is decoded are bfloat16; weights that are bfloat16 already do not get smaller by it."""
    exact = elision.compile(source(), dtype="bf16")
    model = with_passes(exact, ["int8"])
    assert model(IDS).logits.dtype == torch.bfloat16
    assert {t.dtype for t in model.program.params.values() if t.encoding} == {"bf16"}
    with pytest.raises(BadInput, match="bf16: nothing to store"):
        with_passes(exact, ["bf16"])


def test_text() -> None:
    assert Int8Weights("row").text() == "int8:group=row" and from_text("int8:group=row") == Int8Weights("row")
    assert from_text("int8:group=64") == Int8Weights(64) and from_text("int8:group=32").text() == "int8"
    assert from_text("int4:group=32") == Int4Weights() and from_text("int4:group=64").text() == "int4:group=64"
    with pytest.raises(BadInput, match=r"group=1\.5 is not of the expected type"):
        Int8Weights(1.5)  # type: ignore[arg-type]
