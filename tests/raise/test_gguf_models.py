"""Tiny models written to GGUF as llama.cpp's converter would, and read back: the same model, to the last bit of its logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf_families import FAMILIES, tiny
from gguf_files import write_model
from torch import nn

from elision.errors import BadInput
from elision.frontend.gguf.architecture import ARCHITECTURES
from elision.frontend.gguf.container import GGUF
from elision.frontend.gguf.model import load


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_read_is_the_model_written(family: str, tmp_path: Path) -> None:
    architecture, model = tiny(family)
    write_model(tmp_path / "m.gguf", architecture, model)
    found, stored = load(GGUF.open(tmp_path / "m.gguf"))
    assert torch.equal(logits(found), logits(model))
    parameters = dict(found.named_parameters())
    assert stored and all(torch.equal(blocks.decode(), parameters[name]) for name, blocks in stored.items())
    assert not any(p.is_meta for p in found.state_dict().values())


def test_every_architecture_is_tried() -> None:
    assert {row[0] for row in FAMILIES.values()} == {name.partition("+")[0] for name in ARCHITECTURES}


def test_what_older_files_leave_out(tmp_path: Path) -> None:
    for family, keys in [
        ("gemma3", ["rope.freq_base"]), ("llama, tied", ["attention.key_length", "attention.value_length"]),
        ("phi2", ["attention.head_count_kv"]),
    ]:  # fmt: skip
        architecture, model = tiny(family, **({"num_key_value_heads": 4} if family == "phi2" else {}))
        write_model(tmp_path / "m.gguf", architecture, model, dict.fromkeys(keys))
        assert torch.equal(logits(load(GGUF.open(tmp_path / "m.gguf"))[0]), logits(model))


def test_weights_stay_when_the_file_goes(tmp_path: Path) -> None:
    architecture, model = tiny("llama")
    write_model(tmp_path / "m.gguf", architecture, model)
    found, _ = load(GGUF.open(tmp_path / "m.gguf"))
    with open(tmp_path / "m.gguf", "r+b") as file:
        file.write(bytes((tmp_path / "m.gguf").stat().st_size))
    assert torch.equal(logits(found), logits(model))


def test_weights_come_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    architecture, model = tiny("llama, tied")
    write_model(tmp_path / "m.gguf", architecture, model)
    found, _ = load(GGUF.open(tmp_path / "m.gguf"), torch.bfloat16)
    expected = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_metadata_that_the_tensors_contradict_are_refused(tmp_path: Path) -> None:
    architecture, model = tiny("llama")
    for changes, message in [
        ({"block_count": 2}, r"'blk\.2\.\w+\.weight' has no place in the model"),
        ({"block_count": 4}, r"lacks the weight 'model\.layers\.3\."),
        ({"block_count": 2**31}, r"llama\.block_count is 2147483648; expected a whole number from 1 to"),
        ({"feed_forward_length": 64}, r"has the shape \(\d+, \d+\), not \(\d+, \d+\) as the metadata say"),
        ({"attention.head_count": 0}, r"llama\.attention\.head_count is 0; expected a whole number"),
        ({"attention.head_count": [4, 4, 4]}, r"llama\.attention\.head_count is an array of 3"),
        ({"attention.key_length": 2**30}, r"llama\.attention\.key_length is 1073741824"),
        ({"attention.key_length": None, "attention.head_count": 3}, "64 channels do not divide into 3 heads"),
        ({"embedding_length": None}, r"does not say llama\.embedding_length"),
        ({"attention.layer_norm_rms_epsilon": "small"}, r"layer_norm_rms_epsilon is 'small'; expected a number"),
        ({"rope.dimension_count": 8}, "rotary positions turn 8 of 16 channels, which llama models do not"),
        ({"rope.scaling.type": "odd"}, r"rope\.scaling\.type is 'odd'"),
        ({"expert_count": 4}, r"does not say llama\.expert_used_count"),
    ]:
        write_model(tmp_path / "m.gguf", architecture, model, changes)
        with pytest.raises(BadInput, match=message):
            load(GGUF.open(tmp_path / "m.gguf"))


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    _, model = tiny("gpt2")
    write_model(tmp_path / "m.gguf", "gpt2", model)
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0odd2"))
    with pytest.raises(BadInput, match="the architecture 'odd2' cannot be read from GGUF; expected one of llama, qwen2"):
        load(GGUF.open(tmp_path / "m.gguf"))
