"""Programs with the shapes of large models: a tiny model's program, whose sizes are all different, with large ones in their
places.

Nothing of such a size is ever allocated; kernels are planned and compiled from types alone."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
import transformers

import elision
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.program import Program

#: The tiny model's own sizes: 4 heads and 2 of keys, of 24 channels, 64 hidden, 128 inside, a vocabulary of 112, 6 experts.
TINY = dict(
    num_attention_heads=4, num_key_value_heads=2, head_dim=24, hidden_size=64, intermediate_size=128, vocab_size=112,
    max_position_embeddings=72,
)  # fmt: skip
MIXED = {"num_local_experts": 6, "num_experts_per_tok": 2}
#: Of a shape (`CHECKED` are no models): family, query heads, key heads, channels of a head, hidden, inside, vocabulary.
SHAPES: dict[str, tuple[str, int, int, int, int, int, int]] = {
    "smollm2": ("LlamaConfig", 9, 3, 64, 576, 1536, 49152),
    "llama-3-8b": ("LlamaConfig", 32, 8, 128, 4096, 14336, 128256),
    "qwen3-8b": ("Qwen3Config", 32, 8, 128, 4096, 12288, 151936),
    "tiny": ("LlamaConfig", 4, 2, 16, 32, 64, 64),
    "small": ("LlamaConfig", 2, 1, 128, 256, 256, 64),
    "medium": ("LlamaConfig", 16, 4, 128, 2048, 4096, 4096),
    "mixtral": ("MixtralConfig", 32, 8, 128, 4096, 14336, 32000),
}
CHECKED = ("tiny", "small", "medium")


@cache
def _text(family: str, passes: tuple[str, ...], layers: int) -> str:
    changes: dict[str, Any] = MIXED if family == "MixtralConfig" else {}
    torch.manual_seed(0)
    config = getattr(transformers, family)(**TINY, **changes, num_hidden_layers=layers)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return print_program(elision.compile(model, passes=passes, target="reference", dtype="bfloat16").program)


def shaped(name: str, passes: tuple[str, ...] = (), layers: int = 1, stored: str = "") -> Program:
    """A program of some layers with the shapes of a model, in bfloat16; in the place of weights of ``int4:group=32`` such as are
    ``stored`` in a file (``Q4_K``)."""
    family, heads, cached, dim, hidden, inside, vocabulary = SHAPES[name]
    sizes = {
        "heads=2, dim=24, vdim=24": f"heads={cached}, dim={dim}, vdim={dim}", "4, 24": f"{heads}, {dim}",
        "2, 24": f"{cached}, {dim}", "Scores(group=2": f"Scores(group={heads // cached}",
        "depth=64": "depth=64",
        "24": dim, "96": heads * dim, "48": cached * dim, "64": hidden, "128": inside, "256": 2 * inside, "112": vocabulary,
        "f32[12]": f"f32[{dim // 2}]", "6": 8,
    }  # fmt: skip
    found = re.sub(
        rf"(?<![\w.])({'|'.join(map(re.escape, sizes))})(?![\w.])", lambda m: str(sizes[m[1]]), _text(family, passes, layers)
    )
    return parse_program(found.replace("int4(group=32)", stored) if stored else found)
