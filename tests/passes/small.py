"""A tiny model and prompts that the tests of whole runs share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOM = 160  # positions of the model


def tiny(**changes: Any) -> Any:
    """A random Llama whose greedy text soon repeats itself; it ends at no token. ``changes``: of its configuration."""
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=ROOM, initializer_range=0.1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    """Four prompts of different lengths that repeat themselves, left-padded: ids and mask ``[4, 30]``."""
    lengths, generator = (7, 30, 1, 18), torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(4, 30, dtype=torch.int64), torch.zeros(4, 30, dtype=torch.int64)
    for row, n in enumerate(lengths):
        ids[row, 30 - n :] = torch.randint(1, 9, (n,), generator=generator)
        mask[row, 30 - n :] = 1
    return ids, mask
