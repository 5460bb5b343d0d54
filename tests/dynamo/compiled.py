"""What the tests of torch.compile share."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from elision.backend import report
from elision.dynamo.report import GraphReport


def graphs() -> list[GraphReport]:
    return report()["graphs"]


def decoder(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(rows * length))


def close(found: torch.Tensor, want: torch.Tensor) -> bool:
    return found.shape == want.shape and bool((found - want).abs().max() <= 1e-5 * want.abs().max())


def twice(compiled: Any, *args: Any, **kwargs: Any) -> Any:
    """The second call: the first of a graph gives what eager gives, and is what the graph is checked on."""
    with torch.no_grad():
        compiled(*args, **kwargs)
        return compiled(*args, **kwargs)
