"""Families besides those of `families`: the model is raised and right, or the user is told; never silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import BASE, GROUPS, LATENT
from right import assert_right, shaken
from torch import nn

import elision
from elision.errors import UnsupportedModel

PARTS = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}
BART = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in PARTS.items()}
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=128)
RIGHT: dict[str, dict[str, Any]] = {
    "StableLm": {**BASE, "partial_rotary_factor": 0.5},
    "Starcoder2": {**BASE, "sliding_window": 8},
    "Granite": {**BASE, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "Gemma": {**BASE, "head_dim": 16},
    "Nemotron": BASE,
    "MiniCPM3": {**BASE, **LATENT, "q_lora_rank": 24, "num_hidden_layers": 3},
    "Youtu": {**BASE, **LATENT, "q_lora_rank": None, "num_hidden_layers": 3},
    "Glm4MoeLite": {**BASE, **LATENT, **GROUPS, "num_hidden_layers": 3},
    "AXK1": {**BASE, **LATENT, **GROUPS, "num_hidden_layers": 3},
    "XGLM": {**IDS, "d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},  # a sinusoid with an offset
    "Bart": {**IDS, **BART, "d_model": 64},  # its decoder: learned positions with an offset, counted by the model itself
    "DistilBert": {**IDS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
}
TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "T5": (
        {**IDS, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
        "t5 cannot be raised: it has 2 streams: .* from decoder_input_ids, .* from input_ids",
    ),
    "Esm": (
        {**IDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96},
        "esm cannot be raised: the model reads .*attention_mask",
    ),
    "Mamba": ({**BASE, "state_size": 8}, "MambaForCausalLM cannot be traced"),
    "Lfm2": ({**BASE, "layer_types": ["conv", "full_attention"] * 2}, "lfm2 cannot be raised: operator aten.conv1d"),
    "Vilt": (
        dict(image_size=32, patch_size=8, hidden_size=64, num_attention_heads=4, num_hidden_layers=2),
        "ViltModel cannot be traced",
    ),
}


def model(family: str, values: dict[str, Any]) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(0)
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return shaken((transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config))


@pytest.mark.parametrize("family", RIGHT)
def test_right(family: str) -> None:
    original = model(family, RIGHT[family])
    assert_right(original, elision.compile(original, target="reference"))  # what was raised; tests of native code compare with it


@pytest.mark.parametrize("family", TOLD)
def test_told(family: str) -> None:
    """What cannot be raised yet is said in a sentence; a family that a later version raises moves to `RIGHT`."""
    values, says = TOLD[family]
    with pytest.raises(elision.BadInput, match=says):
        elision.compile(model(family, values))


def test_an_error_that_nobody_foresaw_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise IndexError("out of range\nin detail")

    monkeypatch.setattr("elision.frontend.raising.check_program", broken)
    with pytest.raises(UnsupportedModel, match="llama cannot be raised: IndexError: out of range. This is a fault of the front"):
        elision.compile(model("Llama", BASE))


def test_alibi_that_is_rounded_is_told() -> None:
    """Falcon multiplies slopes and positions in bfloat16, which has not all integers above 256."""
    values = {**BASE, "alibi": True, "max_position_embeddings": 300}
    with pytest.raises(UnsupportedModel, match="a mask is never dropped"):
        elision.compile(model("Falcon", values))
    elision.compile(model("Falcon", values).bfloat16())
    elision.compile(model("Falcon", {**values, "max_position_embeddings": 256}))


def test_positions_that_depend_on_the_length_are_told() -> None:
    """Dynamic RoPE: other frequencies beyond the length of training."""
    rope = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    with pytest.raises(UnsupportedModel, match="cannot be traced with dynamic batch and length.*dynamic RoPE"):
        elision.compile(model("Llama", {**BASE, "rope_parameters": rope}))
