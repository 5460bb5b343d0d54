"""Any causal-LM configuration of transformers made tiny, by the names of its fields.

Widths, counts, windows and vocabularies become small; what they are relative to each other (grouped heads, kinds of layers,
partial rotation, experts per token) stays, so that the tiny model still has the structure of the family.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

LAYERS, HEADS, HIDDEN, HEAD_DIM, VOCABULARY, POSITIONS, WINDOW = 4, 4, 64, 16, 128, 128, 8
#: Name of a field, as a whole, to its tiny value. The first that fits counts; values that are smaller already stay.
SIZES: list[tuple[str, int]] = [
    (r"qk_rope_head_dim|rotary_dim|index_head_dim", 8),
    (r"(.*_)?(head_dim|head_size|d_head|d_kv)|kv_channels|attention_key_size", HEAD_DIM),
    (r"(num_|n_)?((encoder|decoder|hidden|text|attention)_)?layers?|num_hidden_layers|n_layer|num_blocks", LAYERS),
    (r"(num|n|encoder|decoder)_(attention_)?heads?|num_attention_heads|n_head|linear_num_(key|value)_heads", HEADS),
    (r"index_n_heads", 2),
    (r"n_group|num_expert_groups?", 2),
    (r"topk_group|first_k_dense_replace|n_shared_experts|num_shared_experts", 1),
    (r".*experts?_per_tok(en)?|(moe_)?top_?k(_experts?)?|moe_k|num_experts_per_token", 2),
    (r"(moe_)?(num|n)_(local_|routed_|moe_|total_)*experts|(num|n)_.*_experts|num_experts", 4),
    (r"(moe|expert|shared|routed).*(intermediate|ffn|hidden).*", 32),
    (r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|d_ff|dff|n_inner|hidden_dim|ffn_size)", 96),
    (r"(.*_)?vocab(_size.*)?|n_vocab", VOCABULARY),
    (r".*(max_|n_).*(position|ctx|seq|len|target|source).*|n_positions|n_ctx|seq_length|max_position.*", POSITIONS),
    (r".*(sliding_window|window_size|attention_chunk_size|local_window|attention_window).*|window", WINDOW),
    (r"q_lora_rank", 24),
    (r".*_rank", HEAD_DIM),
    (r".*(state_size|d_state|ssm_state.*)", 8),
    (r"image_size", 32),
    (r"patch_size", 8),
    (r"(.*_)?(hidden_size|n_embd|d_model|d_embed|embed(ding)?_dim|embedding_size|emb_dim|word_embed_proj_dim|width)|dim", HIDDEN),
    (r"hidden_size_per_layer_input", HIDDEN),
]
#: What no rule by name can know: fields that depend on one another in a way of their own, or that have no usable default.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2}
FIXES: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS},
    "xmod": {"default_language": "en_XX"},
}


def tiny(cls: type[Any]) -> Any:
    """A configuration of the class, made tiny. Raises what the class raises if it cannot be made."""
    known = set(inspect.signature(cls.__init__).parameters)
    values = {k: v for k, v in cls().to_dict().items() if k in known or k in cls.sub_configs}
    config: Any = cls.from_dict(shrink(values, cls.model_type))
    return config


def shrink(values: dict[str, Any], family: str) -> dict[str, Any]:
    """The fields of a configuration (or of one inside it) with tiny values."""
    found = {name: _value(name, value) for name, value in values.items()}
    if "qk_rope_head_dim" in found and "head_dim" in found:
        found["head_dim"] = found["qk_rope_head_dim"]
    if "qk_head_dim" in found and "qk_nope_head_dim" in found:
        found["qk_head_dim"] = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    _token_ids(found)
    _grouped(values, found)
    _per_layer(values, found)
    for name, value in (("tie_word_embeddings", False), ("is_decoder", True)):
        if name in found:
            found[name] = value
    found.pop("per_layer_config", None)  # derived from the kinds of layers
    return {**found, **FIXES.get(family, {})}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        if "rope_type" in value:
            return {k: min(v, POSITIONS // 4) if k == "original_max_position_embeddings" else v for k, v in value.items()}
        return shrink(value, value["model_type"]) if "model_type" in value else value
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    return value if size is None else min(value, size)


def _token_ids(found: dict[str, Any]) -> None:
    """Special tokens that would be outside of the tiny vocabulary."""
    free = iter(range(VOCABULARY))
    for name, value in found.items():
        if re.fullmatch(r".*_(id|index|ids)", name) and name != "problem_type":
            if isinstance(value, int) and value >= VOCABULARY:
                found[name] = next(free)
            elif isinstance(value, list) and all(isinstance(v, int) for v in value):
                found[name] = [v if v < VOCABULARY else next(free) for v in value]


def _grouped(values: dict[str, Any], found: dict[str, Any]) -> None:
    """Key/value heads: as many as queries, one, or half as many, as the family has them."""
    heads = next((values[n] for n in ("num_attention_heads", "n_head", "n_heads", "num_heads") if values.get(n)), None)
    for name, value in values.items():
        if re.fullmatch(r".*num_key_value_heads|(num|n)_kv_heads|n_head_kv|kv_n_heads", name) and isinstance(value, int):
            found[name] = HEADS if value == heads else 1 if value == 1 else HEADS // 2


def _per_layer(values: dict[str, Any], found: dict[str, Any]) -> None:
    """Lists with one entry per layer keep those of as few layers as show every kind."""
    name = next((n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if isinstance(values.get(n), int)), None)
    if name is None:
        return
    lists = [n for n, v in values.items() if isinstance(v, list) and len(v) == values[name]]
    kinds = list(zip(*(map(str, values[n]) for n in lists), strict=True))
    kept = list({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[: 2 * LAYERS]  # the first of each kind
    others = [i for i in range(len(kinds)) if i not in kept]
    kept = sorted(kept + others[: max(0, LAYERS - len(kept))])
    for n in lists:
        found[n] = [_value(n, values[n][i]) for i in kept]
    if lists:
        found[name] = len(kept)
