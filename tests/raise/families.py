"""Tiny random models of the decoder families, shaped so that a wrong mask, window or position changes their tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
GROUPS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
UNTIED = {"tie_word_embeddings": False}
GPT2 = {**UNTIED, "vocab_size": 128, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}
# Scores are not scaled, so more and smaller heads keep rounding small.
GPT_NEO = {**UNTIED, "vocab_size": 128, "hidden_size": 64, "max_position_embeddings": 128, "num_layers": 4, "num_heads": 16}
#: Family to (configuration class, what differs from `BASE`; None instead of BASE's keys where the names are others).
DECODERS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "llama": (T.LlamaConfig, {}, True),
    "mistral": (T.MistralConfig, {"sliding_window": 8}, True),
    "qwen2": (T.Qwen2Config, {}, True),
    "qwen3": (T.Qwen3Config, {"head_dim": 16}, True),
    "gemma2": (
        T.Gemma2Config,
        {**UNTIED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
        True,
    ),
    "gemma3": (
        T.Gemma3TextConfig,
        {**UNTIED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
        True,
    ),
    "gpt2": (T.GPT2Config, GPT2, False),
    "opt": (T.OPTConfig, {**UNTIED, "ffn_dim": 96, "word_embed_proj_dim": 64}, True),
    "phi": (T.PhiConfig, {"num_key_value_heads": 4}, True),
    "phi3": (T.Phi3Config, {}, True),
    "gpt_neox": (T.GPTNeoXConfig, {}, True),
    "falcon": (T.FalconConfig, {**UNTIED}, True),
    "mixtral": (T.MixtralConfig, {"num_local_experts": 4}, True),
    "qwen3_moe": (T.Qwen3MoeConfig, {"head_dim": 16, **MOE}, True),
    "gpt_oss": (
        T.GptOssConfig,
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "layer_types": ALTERNATING},
        True,
    ),
    "olmo2": (T.Olmo2Config, {}, True),
    "cohere": (T.CohereConfig, {}, True),
    "glm4": (T.Glm4Config, {"head_dim": 16}, True),
    "llama4": (
        T.Llama4TextConfig,
        {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "no_rope_layers": [1, 1, 0, 0],
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": True,
            "attn_temperature_tuning": True,
            "floor_scale": 4,
            "attn_scale": 0.3,
            "rope_parameters": LLAMA3_ROPE,
        },
        True,
    ),
    "deepseek_v2": (
        T.DeepseekV2Config,
        {**LATENT, **GROUPS, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0},
        True,
    ),
    "deepseek_v3": (T.DeepseekV3Config, {**LATENT, **GROUPS, "q_lora_rank": 24}, True),
    "deepseek_v3_halves": (
        T.DeepseekV3Config,
        {**LATENT, **GROUPS, "q_lora_rank": 24, "rope_interleave": False, "rope_parameters": {**YARN, "mscale_all_dim": 1.0}},
        True,
    ),
    "smollm3": (T.SmolLM3Config, {"no_rope_layers": [1, 0, 1, 0]}, True),
    # attention written out, in the model or with ALiBi
    "bloom": (T.BloomConfig, {**UNTIED, "vocab_size": 128, "hidden_size": 64, "n_layer": 4, "n_head": 4}, False),
    "mpt": (T.MptConfig, {**UNTIED, "vocab_size": 128, "d_model": 64, "n_layers": 4, "n_heads": 16, "max_seq_len": 128}, False),
    "falcon_alibi": (T.FalconConfig, {**UNTIED, "alibi": True}, True),
    "gptj": (T.GPTJConfig, {**GPT2, "rotary_dim": 8}, False),
    "codegen": (T.CodeGenConfig, {**GPT2, "rotary_dim": 8}, False),
    "gpt_neo": (
        T.GPTNeoConfig,
        {**GPT_NEO, "window_size": 8, "attention_types": [[["global", "local"], 2]]},
        False,
    ),
    # attention through the registry
    "gpt_bigcode": (T.GPTBigCodeConfig, GPT2, False),
    "stablelm": (T.StableLmConfig, {"partial_rotary_factor": 0.5}, True),
    "starcoder2": (T.Starcoder2Config, {**UNTIED, "sliding_window": 8}, True),
    "granite": (T.GraniteConfig, {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 3.0}, True),
    "persimmon": (T.PersimmonConfig, {}, True),
    "biogpt": (T.BioGptConfig, UNTIED, True),
    "nemotron": (T.NemotronConfig, {}, True),
    "olmo": (T.OlmoConfig, {}, True),
    "olmo3": (T.Olmo3Config, {"sliding_window": 8, "layer_types": ALTERNATING}, True),
    "ernie4_5": (T.Ernie4_5Config, {**UNTIED, "head_dim": 16}, True),
    "helium": (T.HeliumConfig, {"head_dim": 16}, True),
    "exaone4": (T.Exaone4Config, {"sliding_window": 8, "layer_types": ALTERNATING}, True),
    "seed_oss": (T.SeedOssConfig, {"head_dim": 16}, True),
    "hunyuan_dense": (
        T.HunYuanDenseV1Config,
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
        True,
    ),
    "arcee": (T.ArceeConfig, {}, True),
}

#: Families like others in every part: their tests are run by `make nightly`.
NIGHTLY = {
    "stablelm", "starcoder2", "granite", "biogpt", "nemotron", "olmo", "olmo3", "ernie4_5", "helium", "exaone4", "seed_oss",
    "arcee",
}  # fmt: skip
#: Families that are unlike each other in native code: the long tests of the others are run by `make nightly`.
UNLIKE = {
    "llama", "gemma3", "gpt2", "phi", "falcon", "mixtral", "gpt_oss", "cohere", "llama4", "deepseek_v3", "smollm3", "bloom",
    "gptj", "gpt_neo", "gpt_bigcode", "persimmon",
}  # fmt: skip

#: All families, to parametrise tests with.
FAMILIES = [pytest.param(f, marks=pytest.mark.nightly) if f in NIGHTLY else f for f in DECODERS]
LONG = [f if f in UNLIKE else pytest.param(f, marks=pytest.mark.nightly) for f in DECODERS]
#: For what a few structures tell: norms of heads and windows, sinks and experts, latent heads, ALiBi.
_FEW = {"llama", "gemma3", "gpt_oss", "deepseek_v3", "bloom"}
FEW = [f if f in _FEW else pytest.param(f, marks=pytest.mark.nightly) for f in DECODERS]


def decoder(family: str, **changes: Any) -> nn.Module:
    """A model of the family with weights large enough that greedy decoding varies and top tokens are far apart."""
    cls, differs, base = DECODERS[family]
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(cls(**{**(BASE if base else {}), **differs, **changes}))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            scale = 1.0 if "embed" in name or "wte" in name else 2.0 / p.shape[-1] ** 0.5
            p.data.normal_(0, scale, generator=generator)
        else:
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
    for name, b in model.named_buffers():
        if name in model.state_dict():  # the biases of routers, which begin as zeros
            b.add_(torch.randn(b.shape, generator=generator) * 0.3)
    return model.eval()
