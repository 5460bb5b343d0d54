"""Speed of kvpress (NVIDIA) on SmolLM2, for `benchmarks/kv_speed.py`, which runs this file with the interpreter of an environment
that has kvpress: ``PYTHON benchmarks/kvpress_peer.py MODEL_DIRECTORY THREADS CONTEXT...``. Prints a JSON object per line.

kvpress 0.5.5 wants transformers before 5.3, so it has an environment of its own:

    python -m venv KVPRESS
    KVPRESS/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    KVPRESS/bin/pip install --no-deps kvpress==0.5.5
    KVPRESS/bin/pip install "transformers<5.3" accelerate "cachetools<6" datasets requests fire
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

import torch
from kvpress import ExpectedAttentionPress, ObservedAttentionPress, SnapKVPress, StreamingLLMPress
from transformers import AutoModelForCausalLM, DynamicCache

NEW = 24
PRESSES = {
    "nothing": (None, "sdpa"),
    "SnapKV": (SnapKVPress(compression_ratio=0.5), "sdpa"),
    "ExpectedAttention": (ExpectedAttentionPress(compression_ratio=0.5), "sdpa"),
    "StreamingLLM": (StreamingLLMPress(compression_ratio=0.5), "sdpa"),
    "ObservedAttention": (ObservedAttentionPress(compression_ratio=0.5), "eager"),  # it reads the attention weights
}


def measure(model: Any, press: Any, ids: torch.Tensor) -> tuple[float, float, int]:
    """Seconds to the first token and of a token among the fastest 16 in a row after it, and bytes of keys and values."""
    cache = DynamicCache()
    start = time.perf_counter()
    with press(model) if press is not None else contextlib.nullcontext():
        found = model(ids, past_key_values=cache, logits_to_keep=1)
    last = found.logits[0, -1].argmax()
    first = time.perf_counter() - start
    times = [time.perf_counter()]
    for i in range(NEW):
        at = torch.tensor([[ids.shape[1] + i]])
        last = model(last.view(1, 1), past_key_values=cache, position_ids=at).logits[0, -1].argmax()
        times.append(time.perf_counter())
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    return first, min(b - a for a, b in zip(times, times[16:], strict=False)) / 16, held


def main() -> None:
    directory, threads, *contexts = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        for context in map(int, contexts):
            ids = torch.randint(100, 40000, (1, context), generator=torch.Generator().manual_seed(0))
            for name, (press, attention) in PRESSES.items():
                model.set_attn_implementation(attention)
                first, token, held = measure(model, press, ids)
                print(json.dumps({"context": context, "name": name, "first": first, "token": token, "state": held}), flush=True)


if __name__ == "__main__":
    main()
