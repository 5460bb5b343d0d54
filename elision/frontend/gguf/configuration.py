"""GGUF metadata becomes a configuration of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from elision.errors import BadInput
from elision.frontend.gguf.architecture import architecture_of
from elision.frontend.gguf.container import GGUF

#: Fields without a key in older files, and what then holds.
_OPTIONAL = {"num_key_value_heads": "attention.head_count", "num_kv_heads": "attention.head_count"}

#: Texts of tokens that end a turn: llama.cpp stops at them, though the file may name only one of them.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>")


class Metadata:
    """The metadata of one architecture, with types checked."""

    def __init__(self, file: GGUF) -> None:
        self.file = file
        self.prefix, self.architecture = architecture_of(file)
        self._largest = max((max(t.shape) for t in file.tensors.values()), default=0)

    def get(self, key: str) -> Any:
        """The value of ``{architecture}.{key}``, None without one."""
        return self.file.metadata.get(f"{self.prefix}.{key}")

    def size(self, key: str) -> int | None:
        """A positive whole number. A size, so no larger than the largest axis of the tensors, but for the context length."""
        value = self.get(key)
        most = 2**31 if key.endswith("context_length") else max(self._largest, len(self.file.tensors))
        if value is not None and (type(value) is not int or not 0 < value <= most):
            text = f"an array of {len(value)}" if isinstance(value, np.ndarray | list) else repr(value)
            raise BadInput(f"{self.file.path}: {self.prefix}.{key} is {text}; expected a whole number from 1 to {most}")
        return value

    def real(self, key: str) -> float | None:
        value = self.get(key)
        if value is not None and (type(value) not in (int, float) or not abs(value) < float("inf")):
            raise BadInput(f"{self.file.path}: {self.prefix}.{key} is {value!r}; expected a number")
        return value

    def need(self, value: Any, key: str) -> Any:
        if value is None:
            raise BadInput(f"{self.file.path} does not say {self.prefix}.{key}; expected it in a file of this architecture")
        return value


def configuration(file: GGUF) -> Any:
    """The configuration of transformers that the metadata and the tensors' names describe. Raises BadInput."""
    import transformers

    meta = Metadata(file)
    architecture = meta.architecture
    fields: dict[str, Any] = dict(architecture.fixed)
    for name, key in architecture.fields.items():
        fields[name] = _field(meta, name, key)
    fields |= {name: tensor in file.tensors for name, tensor in architecture.flags.items()}
    fields["vocab_size"] = _embedding(file)[0]
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    if architecture.rotary:
        fields["rope_parameters"] = _rotary(meta, fields)
    fields |= _particular(meta, fields)
    fields |= _tokens(file, fields["vocab_size"])
    config: Any = transformers.AutoConfig.for_model(architecture.model_type, **fields)
    return config


def heads(config: Any) -> tuple[int, int]:
    """Query heads and key-value heads."""
    queries = int(config.num_attention_heads)
    grouped = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return queries, int(grouped or queries)


def _field(meta: Metadata, name: str, key: str) -> Any:
    if name == "use_parallel_residual":
        return bool(meta.need(meta.get(key), key))
    if name == "head_dim":
        return meta.size(key) or _head_width(meta)
    if name == "sliding_window":
        return meta.size(key)
    if name == "original_max_position_embeddings":
        return meta.size(key) or meta.size("context_length")
    if "softcapping" in name:
        return meta.real(key)
    if any(word in name for word in ("eps", "scal", "multiplier")):
        return meta.need(meta.real(key), key)
    value = meta.size(key)
    return meta.size(_OPTIONAL[name]) if value is None and name in _OPTIONAL else meta.need(value, key)


def _head_width(meta: Metadata) -> int:
    width, count = (meta.need(meta.size(k), k) for k in ("embedding_length", "attention.head_count"))
    if width % count:
        raise BadInput(f"{meta.file.path}: {width} channels do not divide into {count} heads")
    return int(width // count)


def _embedding(file: GGUF) -> tuple[int, ...]:
    if "token_embd.weight" not in file.tensors:
        raise BadInput(f"{file.path} has no tensor token_embd.weight; expected a whole language model")
    return file.tensors["token_embd.weight"].shape


def _rotary(meta: Metadata, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Base, scaling and turned part of rotary positions."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.real("rope.freq_base") or 10_000.0}
    width = fields.get("head_dim") or _head_width(meta)
    turned = meta.size("rope.dimension_count") or width
    if turned != width and not meta.architecture.partial:
        raise BadInput(f"{meta.file.path}: rotary positions turn {turned} of {width} channels, which {meta.prefix} models do not")
    if meta.architecture.partial:
        found["partial_rotary_factor"] = turned / width
    kind, factor = meta.get("rope.scaling.type"), meta.real("rope.scaling.factor") or meta.real("rope.scale_linear")
    original = meta.size("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in meta.file.tensors:
        long, short = (meta.file.stored(f"rope_factors_{x}.weight").decode().tolist() for x in ("long", "short"))
        found |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        found["original_max_position_embeddings"] = original or meta.size("context_length")
        if (scale := meta.real("rope.scaling.attn_factor")) is not None:
            found["attention_factor"] = scale
    elif kind == "yarn":
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        extra = {name: value for name, key in names.items() if (value := meta.real(f"rope.scaling.{key}")) is not None}
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **extra}
    elif kind == "linear" or (kind is None and factor not in (None, 1.0)):
        found |= {"rope_type": "linear", "factor": factor}
    elif kind not in (None, "none"):
        raise BadInput(f"{meta.file.path}: rope.scaling.type is {kind!r}; expected none, linear or yarn")
    return found


def _particular(meta: Metadata, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp knows of an architecture and its files leave out."""
    layers = fields.get("num_hidden_layers")
    if meta.prefix in ("gemma2", "gemma3"):
        # Queries are scaled by the head width, in the two 27B models by the share of a head in the stream.
        largest = layers == {"gemma2": 46, "gemma3": 62}[meta.prefix]
        scale = fields["hidden_size"] // fields["num_attention_heads"] if largest else fields["head_dim"]
        return {"query_pre_attn_scalar": scale, **(_gemma3(meta, fields) if meta.prefix == "gemma3" else {})}
    if meta.prefix == "phi3":
        return {"sliding_window": meta.get("attention.sliding_window") or None}
    if meta.prefix == "falcon":
        return {"multi_query": fields["num_kv_heads"] == 1, "new_decoder_architecture": fields["num_kv_heads"] != 1}
    if meta.prefix == "olmo2" and meta.get("attention.sliding_window"):
        raise BadInput(f"{meta.file.path} has a sliding window, so it is an OLMo 3; give its Hugging Face directory")
    return {}


def _gemma3(meta: Metadata, fields: Mapping[str, Any]) -> dict[str, Any]:
    pattern = meta.get("attention.sliding_window_pattern")
    every = 1 if fields["sliding_window"] is None else pattern if type(pattern) is int and pattern > 0 else 6
    local = [(i + 1) % every != 0 for i in range(fields["num_hidden_layers"])]
    if isinstance(pattern, np.ndarray):
        if len(pattern) != len(local):
            raise BadInput(f"{meta.file.path}: the pattern of sliding windows is for {len(pattern)} layers, not {len(local)}")
        local = [bool(x) for x in pattern]
    theta = meta.real("rope.freq_base_swa") or 10_000.0
    return {
        "layer_types": ["sliding_attention" if x else "full_attention" for x in local],
        "rope_parameters": {
            "full_attention": {**fields["rope_parameters"], "rope_theta": meta.real("rope.freq_base") or 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": theta},
        },
        "final_logit_softcapping": meta.real("final_logit_softcapping"),
    }


def _tokens(file: GGUF, vocab: int) -> dict[str, Any]:
    """The ids that start, end and pad a text; several that end it where the file has several."""

    def token(role: str) -> int | None:
        value = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
        return value if type(value) is int and 0 <= value < vocab else None

    ends = dict.fromkeys(x for x in (token("eos"), token("eot"), token("eom")) if x is not None)
    texts, kinds = file.metadata.get("tokenizer.ggml.tokens"), file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(texts, list) and isinstance(kinds, np.ndarray) and len(texts) == len(kinds) == vocab:
        special = np.flatnonzero(kinds == 3).tolist()
        ends |= dict.fromkeys(i for i in special if texts[i] in _TURN_ENDS)
    eos: int | list[int] | None = None if not ends else next(iter(ends)) if len(ends) == 1 else list(ends)
    return {"bos_token_id": token("bos"), "eos_token_id": eos, "pad_token_id": token("padding")}
