"""Tiny randomly initialised models of several families."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def tiny(family: str, **changes: Any) -> nn.Module:
    """A randomly initialised 3-layer causal LM with a configuration of class ``family``."""
    torch.manual_seed(0)
    config = getattr(transformers, family)(**{**SIZES, **changes})
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)  # no norm weight is exactly one
    return model
