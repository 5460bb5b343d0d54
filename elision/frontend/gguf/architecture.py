"""What the names in a GGUF file mean, per architecture: tables from llama.cpp's names to those of transformers.

This is knowledge of a file format. How a model computes is not here: it is read off the traced model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType as Frozen
from typing import Any

from elision.errors import BadInput
from elision.frontend.gguf.container import GGUF
from elision.frontend.gguf.layout import RowOrder, fused_by_group, fused_by_head, rotary_keys, rotary_queries


@dataclass(frozen=True)
class Architecture:
    """One value of ``general.architecture``.

    ``model_type``: of transformers. ``fields``: configuration field to metadata key (after the architecture's name).
    ``names``: tensor to module, both without ``.weight`` and ``.bias``, ``{}`` for the number of the layer. ``joined``:
    parameter to the tensors that lie in it one after another along its second last axis. ``flags``: configuration field to a
    tensor whose presence it states. ``fixed``: configuration that goes without saying in the file. ``rows``: rearranged
    tensors. ``transposed``: tensors of `Conv1D` modules. ``norm_offset``: what the file adds to norm weights.
    ``partial``: rotary positions may turn only a part of a head.
    """

    model_type: str
    fields: Mapping[str, str]
    names: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rows: Mapping[str, RowOrder] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    norm_offset: float = 0.0
    rotary: bool = True
    partial: bool = False


#: Configuration fields that most architectures share.
_SIZES = {
    "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "max_position_embeddings": "context_length",
}  # fmt: skip
_GROUPED = {**_SIZES, "num_key_value_heads": "attention.head_count_kv"}
_RMS = {**_GROUPED, "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_HEADS = {**_RMS, "head_dim": "attention.key_length"}
_MIXTURE = {"num_experts_per_tok": "expert_used_count"}

_EMBEDDINGS = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_ATTENTION = {f"blk.{{}}.attn_{x}": f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkv"} | {
    "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj"
}
_QK_NORM = {f"blk.{{}}.attn_{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm" for x in "qk"}
_GATED = {f"blk.{{}}.ffn_{x}": f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up", "down")}
_NORMS = {
    "output_norm": "model.norm",
    "blk.{}.attn_norm": "model.layers.{}.input_layernorm",
    "blk.{}.ffn_norm": "model.layers.{}.post_attention_layernorm",
}
_POST_NORMS = {
    "blk.{}.post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "blk.{}.post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_LLAMA = {**_EMBEDDINGS, **_ATTENTION, **_GATED, **_NORMS}
_GEMMA = {**_LLAMA, **_POST_NORMS, "blk.{}.ffn_norm": "model.layers.{}.pre_feedforward_layernorm"}
_EXPERTS = {
    "model.layers.{}.mlp.experts.gate_up_proj": ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"),
    "model.layers.{}.mlp.experts.down_proj": ("blk.{}.ffn_down_exps.weight",),
}
_ROUTED = {**{k: v for k, v in _LLAMA.items() if k not in _GATED}, "blk.{}.ffn_gate_inp": "model.layers.{}.mlp.gate"}
_ROTARY_PAIRS: dict[str, RowOrder] = {"blk.{}.attn_q": rotary_queries, "blk.{}.attn_k": rotary_keys}
_BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
_ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}

_LAYER_NORM = "attention.layer_norm_epsilon"
_SECOND_NORM = "blk.0.attn_norm_2.weight"


def _decoder(prefix: str, names: Mapping[str, str]) -> dict[str, str]:
    """Names of a family of its own: those of layers, under ``prefix``."""
    return {f"blk.{{}}.{ours}": f"{prefix}.{{}}.{theirs}" for ours, theirs in names.items()}


_FALCON = Architecture(
    "falcon",
    {
        "hidden_size": "embedding_length", "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
        "num_kv_heads": "attention.head_count_kv", "ffn_hidden_size": "feed_forward_length",
        "max_position_embeddings": "context_length", "layer_norm_epsilon": _LAYER_NORM,
    },
    {
        "token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head",
        **_decoder("transformer.h", {
            "attn_norm": "input_layernorm", "attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
        }),
    },
    fixed={"num_ln_in_parallel_attn": 1},
    flags={"bias": "blk.0.attn_qkv.bias"},
    rows={"blk.{}.attn_qkv": fused_by_group},
)  # fmt: skip
_FALCON_NORMS = {"blk.{}.attn_norm": "transformer.h.{}.ln_mlp", "blk.{}.attn_norm_2": "transformer.h.{}.ln_attn"}

#: ``general.architecture`` to what it means; ``+experts`` for files with a mixture of
#: experts, ``+norms`` for those with one norm for attention and another for the feed-forward half of a parallel block.
ARCHITECTURES: Mapping[str, Architecture] = Frozen({
    "llama": Architecture("llama", _HEADS, _LLAMA, flags=_BIASES, rows=_ROTARY_PAIRS),
    "llama+experts": Architecture(
        "mixtral", {**_HEADS, **_MIXTURE, "num_local_experts": "expert_count"}, _ROUTED, joined=_EXPERTS, rows=_ROTARY_PAIRS
    ),
    "qwen2": Architecture("qwen2", _RMS, _LLAMA),
    "qwen3": Architecture("qwen3", _HEADS, {**_LLAMA, **_QK_NORM}, flags=_ATTENTION_BIAS),
    "qwen3moe+experts": Architecture(
        "qwen3_moe",
        {**_HEADS, **_MIXTURE, "num_experts": "expert_count", "moe_intermediate_size": "expert_feed_forward_length"},
        {**_ROUTED, **_QK_NORM},
        joined=_EXPERTS,
        fixed={"norm_topk_prob": True},
    ),
    "gemma": Architecture("gemma", _HEADS, _LLAMA, norm_offset=1.0),
    "gemma2": Architecture(
        "gemma2",
        {
            **_HEADS, "sliding_window": "attention.sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _GEMMA,
        norm_offset=1.0,
    ),
    "gemma3": Architecture(
        "gemma3_text", {**_HEADS, "sliding_window": "attention.sliding_window"}, {**_GEMMA, **_QK_NORM}, norm_offset=1.0
    ),
    "smollm3": Architecture("smollm3", _RMS, _LLAMA, flags=_BIASES, rows=_ROTARY_PAIRS),
    "granite": Architecture(
        "granite",
        {
            **_RMS, "logits_scaling": "logit_scale", "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale", "embedding_multiplier": "embedding_scale",
        },
        _LLAMA,
        flags=_BIASES,
        rows=_ROTARY_PAIRS,
    ),
    "olmo2": Architecture(
        "olmo2", _RMS,
        {**_EMBEDDINGS, **_ATTENTION, **_QK_NORM, **_GATED, **_POST_NORMS, "output_norm": "model.norm"},
        flags=_ATTENTION_BIAS,
    ),
    "command-r": Architecture(
        "cohere", {**_GROUPED, "layer_norm_eps": _LAYER_NORM, "logit_scale": "logit_scale"}, {**_LLAMA, **_QK_NORM},
        flags={**_ATTENTION_BIAS, "use_qk_norm": "blk.0.attn_q_norm.weight"},
    ),
    "glm4": Architecture(
        "glm4", _HEADS,
        {
            **_EMBEDDINGS, **_ATTENTION, **_NORMS,
            "blk.{}.post_attention_norm": "model.layers.{}.post_self_attn_layernorm",
            "blk.{}.post_ffw_norm": "model.layers.{}.post_mlp_layernorm",
            "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj", "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
        },
        flags=_ATTENTION_BIAS,
        partial=True,
    ),
    "phi2": Architecture(
        "phi", {**_GROUPED, "layer_norm_eps": _LAYER_NORM},
        {
            **_EMBEDDINGS, **_ATTENTION, "output_norm": "model.final_layernorm",
            **_decoder("model.layers", {
                "attn_output": "self_attn.dense", "attn_norm": "input_layernorm", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
            }),
        },
        partial=True,
    ),
    "phi3": Architecture(
        "phi3", {**_RMS, "original_max_position_embeddings": "rope.scaling.original_context_length"},
        {
            **_EMBEDDINGS, **_NORMS, "blk.{}.attn_output": "model.layers.{}.self_attn.o_proj",
            "blk.{}.attn_qkv": "model.layers.{}.self_attn.qkv_proj",
            "blk.{}.ffn_up": "model.layers.{}.mlp.gate_up_proj", "blk.{}.ffn_down": "model.layers.{}.mlp.down_proj",
        },
        partial=True,
    ),
    "starcoder2": Architecture(
        "starcoder2", {**_GROUPED, "norm_epsilon": _LAYER_NORM},
        {
            **_EMBEDDINGS, **_ATTENTION, **_NORMS,
            "blk.{}.ffn_up": "model.layers.{}.mlp.c_fc", "blk.{}.ffn_down": "model.layers.{}.mlp.c_proj",
        },
        flags={"use_bias": "blk.0.attn_q.bias"},
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "n_embd": "embedding_length", "n_layer": "block_count", "n_head": "attention.head_count",
            "n_positions": "context_length", "n_inner": "feed_forward_length", "layer_norm_epsilon": _LAYER_NORM,
        },
        {
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
            "output": "lm_head",
            **_decoder("transformer.h", {
                "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
            }),
        },
        transposed=frozenset(f"blk.{{}}.{x}" for x in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
        rotary=False,
    ),
    "gptneox": Architecture(
        "gpt_neox", {**_SIZES, "layer_norm_eps": _LAYER_NORM, "use_parallel_residual": "use_parallel_residual"},
        {
            "token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head",
            **_decoder("gpt_neox.layers", {
                "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
                "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
            }),
        },
        rows={"blk.{}.attn_qkv": fused_by_head},
        partial=True,
    ),
    "bloom": Architecture(
        "bloom",
        {
            "hidden_size": "embedding_length", "n_layer": "block_count", "n_head": "attention.head_count",
            "layer_norm_epsilon": _LAYER_NORM,
        },
        {
            "token_embd": "transformer.word_embeddings", "token_embd_norm": "transformer.word_embeddings_layernorm",
            "output_norm": "transformer.ln_f", "output": "lm_head",
            **_decoder("transformer.h", {
                "attn_norm": "input_layernorm", "attn_qkv": "self_attention.query_key_value",
                "attn_output": "self_attention.dense", "ffn_norm": "post_attention_layernorm",
                "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h",
            }),
        },
        rows={"blk.{}.attn_qkv": fused_by_head},
        rotary=False,
    ),
    "falcon": _FALCON,
    "falcon+norms": replace(
        _FALCON, names={**_FALCON.names, **_FALCON_NORMS}, fixed={"num_ln_in_parallel_attn": 2}
    ),
})  # fmt: skip


def architecture_of(file: GGUF) -> tuple[str, Architecture]:
    """The file's prefix of metadata keys and its architecture. Raises BadInput naming those that can be read."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise BadInput(f"{file.path} does not say its general.architecture; expected a language model")
    variant = "+experts" if file.metadata.get(f"{name}.expert_count") else "+norms" if _SECOND_NORM in file.tensors else ""
    found = ARCHITECTURES.get(name + variant)
    if found is None:
        known = ", ".join(dict.fromkeys(key.partition("+")[0] for key in ARCHITECTURES))
        what = f"{name!r} with experts" if variant == "+experts" else repr(name)
        raise BadInput(
            f"{file.path}: models of the architecture {what} cannot be read from GGUF; expected one of {known}: give the model's "
            "Hugging Face directory instead"
        )
    return name, found
