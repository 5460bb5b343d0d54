"""Tiny random Llamas and what they compile to, shared by the tests of this area."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import elision
from elision.runtime.text import Tokenizer

PAD, EOS = 0, 2


@dataclass(frozen=True)
class Pair:
    """A transformers model and the same model compiled."""

    original: Any
    compiled: elision.Model


def words(vocab: int) -> Tokenizer:
    """A tokenizer whose token i is the word ``t<i>``, in three digits; t002 is special."""
    core = tokenizers.Tokenizer(models.WordLevel({f"t{i:03}": i for i in range(vocab)}, unk_token="t001"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([f"t{EOS:03}"])
    return Tokenizer(core, {"chat_template": None, "special_tokens": {"eos_token": f"t{EOS:03}"}})


def pair(vocab: int, max_batch: int = 8, spread: float = 0.2, dtype: torch.dtype = torch.float32) -> Pair:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    model: Any = LlamaForCausalLM(config).to(dtype).eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    compiled = elision.compile(model, max_batch=max_batch)
    compiled.tokenizer = words(vocab)
    return Pair(model, compiled)


@pytest.fixture(scope="session")
def llama() -> Pair:
    return pair(128)


@pytest.fixture(scope="session")
def small() -> Pair:
    """A vocabulary of 8 tokens and room for many rows: its distributions can be counted."""
    return pair(8, max_batch=4096, spread=0.2)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of different lengths, without PAD and EOS."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (7, 1, 12, 4)]


@pytest.fixture(scope="session")
def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompts as one left-padded batch, ids and mask ``[B, T]``."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask
