"""Tiny models of all families that GGUF files are read of."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LARGE = dict(vocab_size=128, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
SMALL = dict(vocab_size=128, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
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
    "gpt2": ("gpt2", "gpt2", {**SMALL, "n_embd": 64, "n_positions": 64}),
    "olmo2": ("olmo2", "olmo2", SIZES),
    "smollm3": ("smollm3", "smollm3", {**SIZES, "num_hidden_layers": 5}),
    "starcoder2": ("starcoder2", "starcoder2", {**SIZES, "sliding_window": None}),
    "gptneox": ("gptneox", "gpt_neox", {**SIZES, **rope(partial_rotary_factor=0.25)}),
    "bloom": ("bloom", "bloom", {**SMALL, "hidden_size": 64}),
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


def tiny(family: str, **changes: Any) -> tuple[str, nn.Module]:
    """The architecture of the family's files and a randomly initialised model of it."""
    architecture, model_type, fields = FAMILIES[family]
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**fields, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # no two rows alike, no norm weight one
    return architecture, model
