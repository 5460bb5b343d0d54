"""What torch and transformers take on the same GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from gpu_shapes import SHAPES
from gpu_steps import timed


def sdpa_time(name: str, rows: int, context: int, least: float, device: str) -> float:
    """Seconds of torch's own attention of one token a sequence, with the keys and values of a context."""
    _, heads, cached, dim, *_ = SHAPES[name]
    q = torch.randn(rows, heads, 1, dim, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(rows, cached, context, dim, device=device, dtype=torch.bfloat16) for _ in "kv")
    attention = torch.nn.functional.scaled_dot_product_attention
    return timed(lambda: attention(q, k, v, enable_gqa=True), waits(device), least)


def transformers_time(name: str, layers: int, context: int, least: float, device: str) -> float:
    """Seconds of a step of transformers with a static cache, under ``torch.compile`` (eager where nothing is timed)."""
    family, heads, cached, dim, hidden, inside, vocabulary = SHAPES[name]
    config = getattr(transformers, family)(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inside, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=cached, head_dim=dim, max_position_embeddings=max(8192, 2 * context),
    )  # fmt: skip
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=2 * context)
    forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True) if least else model.forward
    ids, at = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.tensor([context], device=device)
    with torch.inference_mode():
        return timed(lambda: forward(ids, past_key_values=cache, cache_position=at), waits(device), least)


def waits(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None
