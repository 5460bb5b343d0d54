"""Tiny models written to GGUF as llama.cpp's converter would, and read back: the same model, to the last bit of its logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from elision.errors import BadInput
from elision.frontend.gguf.architecture import ARCHITECTURES
from elision.frontend.gguf.container import GGUF
from elision.frontend.gguf.model import load

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LARGE = dict(vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
FALCON = {**LARGE, "new_decoder_architecture": True, "num_kv_heads": 2}


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, **values}}


#: Name to (architecture of the file, model type, configuration).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {**SIZES, **rope(rope_theta=50_000.0)}),
    "llama, tied": ("llama", "llama", {**SIZES, "tie_word_embeddings": True}),
    "llama, biases": ("llama", "llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", "llama", {**SIZES, **rope(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    )}),
    "llama, linear": ("llama", "llama", {**SIZES, **rope(rope_type="linear", factor=4.0)}),
    "llama, yarn": ("llama", "llama", {**SIZES, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)}),
    "mistral": ("llama", "mistral", {**SIZES, "head_dim": 32, "sliding_window": None}),
    "mixtral": ("llama", "mixtral", {**SIZES, "num_local_experts": 4}),
    "qwen2": ("qwen2", "qwen2", {**SIZES, **rope(rope_theta=1e6)}),
    "qwen3": ("qwen3", "qwen3", {**SIZES, "head_dim": 32}),
    "qwen3 moe": ("qwen3moe", "qwen3_moe", {
        **SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True
    }),
    "gemma": ("gemma", "gemma", {**SIZES, "head_dim": 32}),
    "gemma2": ("gemma2", "gemma2", {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": ("gemma3", "gemma3_text", {
        **SIZES, "num_hidden_layers": 7, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8
    }),
    "phi2": ("phi2", "phi", {**SIZES, **rope(partial_rotary_factor=0.5)}),
    "phi3": ("phi3", "phi3", {**SIZES, "sliding_window": 16}),
    "gpt2": ("gpt2", "gpt2", dict(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)),
    "olmo2": ("olmo2", "olmo2", SIZES),
    "smollm3": ("smollm3", "smollm3", {**SIZES, "num_hidden_layers": 5}),
    "starcoder2": ("starcoder2", "starcoder2", {**SIZES, "sliding_window": None}),
    "gptneox": ("gptneox", "gpt_neox", {**SIZES, **rope(partial_rotary_factor=0.25)}),
    "bloom": ("bloom", "bloom", dict(vocab_size=128, hidden_size=64, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)),
    "falcon 7b": ("falcon", "falcon", {**LARGE, "multi_query": True, "num_kv_heads": 1}),
    "falcon 11b": ("falcon", "falcon", {**FALCON, "num_ln_in_parallel_attn": 1}),
    "falcon 40b": ("falcon", "falcon", FALCON),
    "glm4": ("glm4", "glm4", {**SIZES, "head_dim": 16, **rope(partial_rotary_factor=0.5)}),
    "cohere": ("command-r", "cohere", SIZES),
    "cohere, qk-norm": ("command-r", "cohere", {**SIZES, "use_qk_norm": True}),
    "granite": ("granite", "granite", {
        **SIZES, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0, "embedding_multiplier": 3.0
    }),
}  # fmt: skip


def tiny(family: str) -> tuple[str, nn.Module]:
    architecture, model_type, fields = FAMILIES[family]
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # no two rows alike, no norm weight one
    return architecture, model


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
