"""The blocks of a GGUF file reach the program: the same numbers, the file's bytes, whatever the converter rearranged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_families import tiny
from gguf_files import real_file, write_model

import elision
from elision.cli.opening import with_passes
from elision.frontend.gguf.container import GGUF
from elision.frontend.source import load_source
from elision.frontend.stored import blocks_of
from elision.ir.types import Tensor
from elision.ir.weights import Blocks
from elision.passes.calibration import run_score

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))


def mixed(name: str) -> str:
    """Formats that differ by layer and weight; names in the model end in ``weight``."""
    if "embed_tokens" in name or "lm_head" in name:
        return "Q8_0"
    if "gate.weight" in name:  # a router
        return "F32"
    return "Q5_0" if ".1." in name and "down_proj" in name else "BF16" if "o_proj" in name else "Q4_1"


def both(tmp_path: Path, family: str, formats: Callable[[str], str]) -> tuple[elision.Model, elision.Model]:
    """A tiny model of the family from a file with these formats, compiled with floats and with the file's blocks."""
    architecture, model = tiny(family)
    write_model(tmp_path / "m.gguf", architecture, model, formats=formats)
    return elision.compile(tmp_path / "m.gguf"), elision.compile(tmp_path / "m.gguf", passes=["stored"])


def forward(model: elision.Model) -> torch.Tensor:
    """Op by op, which computes the same with floats and with blocks that were decoded."""
    return run_score(model.program, model.weights, list(IDS))[0]


@pytest.mark.parametrize("family", ["llama", "llama, tied", "mixtral", "gemma3"])
def test_numbers_are_those_of_the_dequantised_weights(family: str, tmp_path: Path) -> None:
    """Rotary rows of queries and keys are in another order in the file, gate and up of experts apart, tied tables there once."""
    plain, model = both(tmp_path, family, mixed)
    assert all(t.encoding is None for t in plain.program.params.values())
    for name, type in model.program.params.items():
        expected = plain.weights[name]
        found = model.weights[name] if type.encoding is None else type.encoding.decode(model.weights[name], type.row)
        assert torch.equal(found, expected), name
    assert torch.equal(forward(model), forward(plain))
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.generate(IDS, max_new_tokens=6), plain.generate(IDS, max_new_tokens=6))
    assert model.program.quality == "exact" and model.program.applied[-1] == "stored"
    floats = [n for n, t in model.program.params.items() if t.encoding is None and len(t.axes) > 1]
    assert all("gate.weight" in n for n in floats) and (family == "mixtral") == bool(floats)
    formats = Counter(str(t.encoding) for t in model.program.params.values())
    assert formats["Q4_1"] > 10 and formats["BF16"] and formats["Q8_0"] == (1 if "tied" in family or family == "gemma3" else 2)


def test_layers_in_other_formats_have_other_templates(tmp_path: Path) -> None:
    plain, model = both(tmp_path, "llama", mixed)
    assert list(plain.program.templates) == ["attn", "mlp"] and list(model.program.templates) == ["attn", "mlp", "mlp_1"]
    model.save(tmp_path / "m.elision")
    again = elision.load(tmp_path / "m.elision")
    assert again.program == model.program and torch.equal(again(IDS).logits, model(IDS).logits)


def test_weights_stay_when_the_file_goes(tmp_path: Path) -> None:
    plain, model = both(tmp_path, "llama", lambda name: "Q4_1")
    with open(tmp_path / "m.gguf", "r+b") as file:
        file.write(bytes((tmp_path / "m.gguf").stat().st_size))
    assert torch.equal(forward(model), forward(plain))


def test_four_bits_of_a_file_are_kept_by_the_int4_pass(tmp_path: Path) -> None:
    plain, stored = both(tmp_path, "llama", lambda name: "Q4_1")
    for group, same in ((32, True), (16, True), (64, False)):
        model = with_passes(plain, [f"int4:group={group}"])  # from the floats alone
        assert torch.equal(forward(model), forward(plain)) == same
        assert (model.report["weight_bytes"] == stored.report["weight_bytes"]) == (group == 32)


def test_weights_that_are_no_blocks_stay_floats(tmp_path: Path) -> None:
    """GPT-2's matrices lie transposed in the file; what is encoded after `stored` is what it left."""
    architecture, model = tiny("gpt2")
    write_model(tmp_path / "m.gguf", architecture, model, formats=lambda name: "Q8_0")
    found = elision.compile(tmp_path / "m.gguf", passes=["stored", "int8:group=16"])
    assert torch.equal(found(IDS).logits.argmax(-1), elision.compile(tmp_path / "m.gguf")(IDS).logits.argmax(-1))
    formats = Counter(str(t.encoding) for t in found.program.params.values())
    assert formats["Q8_0"] == 2 and formats["int8(group=16)"] == 12


def test_blocks_belong_to_memory_not_to_names(tmp_path: Path) -> None:
    architecture, model = tiny("llama, tied")
    write_model(tmp_path / "m.gguf", architecture, model, formats=mixed)
    source = load_source(tmp_path / "m.gguf")
    table = source.model.get_input_embeddings().weight.detach()
    found = blocks_of({"head": table, "copy": table.clone(), "t": table.T, "part": table[:64]}, source.model, source.stored)
    assert list(found) == ["head"] and found["head"].format == "Q8_0"


def test_smollm2_is_as_large_as_its_file() -> None:
    """By types alone: the bytes of every tensor, and of all of them but for the file's metadata."""
    file = GGUF.open(real_file())
    total = 0
    for info in file.tensors.values():
        type = Tensor(info.shape, "f32", None if info.format == "F32" else Blocks(info.format))
        shape, dtype = type.storage
        assert int(torch.Size(shape).numel()) * dtype.itemsize == info.nbytes  # type: ignore[arg-type]
        total += info.nbytes
    assert 0 < real_file().stat().st_size - total < 2e6


@pytest.mark.nightly
def test_smollm2_stored() -> None:
    plain, model = elision.compile("smollm2"), elision.compile("smollm2", passes=["stored"])
    tokens = torch.randint(0, 49152, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-3)
    prompt = "The three primary colours are"
    assert model.generate(prompt, max_new_tokens=12) == plain.generate(prompt, max_new_tokens=12)
    assert 0 < real_file().stat().st_size - model.report["weight_bytes"] < 2e6
    four = elision.compile("smollm2", passes=["int4"])
    kept = [n for n, t in model.program.params.items() if t.encoding == Blocks("Q4_1")]
    assert len(kept) == 210 and all(torch.equal(four.weights[n], model.weights[n]) for n in kept)
