"""Quality against speed of every method that acts on decoding, by family: SmolLM2 on native code.

    python benchmarks/frontier.py kv|layers|weights [--rows FILE.jsonl] [--only TEXT ..]

A model reads sequences of 2048 tokens of every second topic of Python's documentation, which no pass is calibrated on: a prompt
of 1792, then one token at a time. Quality is how far its distributions are from the unmodified model's, the mean Kullback-
Leibler divergence in nats, and its perplexity. Speed is that of decoding after such a prompt, in turns with the unmodified
model every few tokens, in seconds of the processor of one thread, so that other load counts little. The unmodified model has
weights in bf16 (of family weights: float32) and a cache of the model's floats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kv_quality import PROMPT, divergence, methods, perplexity, predictions, sequences
from layer_speed import in_turns
from perplexity import with_passes
from rich.console import Console

import elision

TOKENS = 49  # that are decoded in turns

KV = ("streaming-llm", "h2o", "a2sf", "keyformer", "snapkv", "ems", "duo-attention", "quest", "tidal-decode")
LAYERS = {
    "shortgpt": [f"shortgpt:share={share}" for share in (0.1, 0.2, 0.3)],
    "unified-skip": [f"unified-skip:keep={keep},speedup=1.5" for keep in (27, 24, 21)],
    "skipdecode": [f"skipdecode:length=2048,stages=16,most=30,least={least}" for least in (24, 18, 12)],
    "calm": [f"calm:exits=20+25,rule=softmax,threshold={t}" for t in (0.9, 0.7, 0.5)],
    # what its search, a quarter of an hour, chose for `benchmarks/layers.py`
    "evopress": [
        "evopress:share=0.1,attn=7+17+26,mlp=16-17+25",
        "evopress:share=0.25,attn=3+5+7+12+14+25-26,mlp=3+5+12-14+25-26",
        "evopress:share=0.4,attn=3-7+10+13-14+17-18+25-26,mlp=3-6+12-14+16-17+25-27",
    ],
    "first-router": [f"first-router:share={share}" for share in (0.1, 0.2, 0.3)],
}
#: Not of 32 weights, the usual: the file's own blocks are such, and rounding them again changes nothing.
GROUPS = (64, 96, 192)
WEIGHTS = {"bf16": ["bf16"], "int8": ["int8"], "int8 a8": ["int8 a8"]} | {
    name: [f"{name}:group={group} {rest}".rstrip() for group in GROUPS]
    for name, rest in {"int4": "", "gptq": "int8", "smoothquant-plus": "int8"}.items()
}


def family(name: str) -> dict[str, list[str]]:
    """Passes, separated by spaces, by method."""
    if name == "layers":
        return LAYERS
    if name == "weights":
        return WEIGHTS
    shares = (0.5, 0.25, 0.125)
    found = {method: [methods(share)[method] for share in shares] for method in KV}
    rounded = ["kivi:bits=4,group=32,residual=32", "kivi:bits=2,group=32,residual=128"]
    return found | {"kv-quant": ["kv-quant:bits=8"], "kivi": rounded, "gear": ["gear:bits=4", "gear:bits=2"]}


def rows(name: str, only: list[str]) -> Iterator[dict[str, Any]]:
    weights = [] if name == "weights" else ["bf16"]
    base = elision.compile("smollm2", target="reference", threads=1)
    whole = with_passes(base, weights)[0]
    text = sequences(whole, 2)
    with torch.inference_mode():
        full = predictions(whole, text)
    yield {"method": "", "passes": "", "perplexity": perplexity(full, text), "divergence": 0.0, "speedup": 1.0}
    for method, settings in family(name).items():
        for passes in settings:
            if only and not any(passes.startswith(start) for start in only):
                continue
            model = with_passes(base, [*weights, *passes.split()])[0]
            with torch.inference_mode():
                found = predictions(model, text)
            seconds = np.array(in_turns([whole, model], text[0, :PROMPT].tolist(), TOKENS))
            yield {
                "method": method, "passes": passes, "perplexity": perplexity(found, text), "divergence": divergence(found, full),
                "speedup": float(np.median(seconds[0]) / np.median(seconds[1])), "seconds": seconds.tolist(),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=["kv", "layers", "weights"])
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of passes")
    parser.add_argument("--rows", type=Path, help="where a line of JSON is appended for every program")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True, soft_wrap=True)
    for row in rows(args.family, args.only):
        console.print({k: v for k, v in row.items() if k != "seconds"})
        if args.rows:
            with args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
