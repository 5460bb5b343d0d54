"""Leave tokens out of an encoder: what merging them saves, and how little it moves the similarity of sentences.

python examples/encoder_pruning.py [FOLDER] [--passes tome:share=0.1,metric=heads evit:keep=0.7]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize
from torch_compile_backend import packaged

import elision

PASSES = ("tome:share=0.1,metric=heads", "evit:keep=0.7", "zero-tprune:keep=0.6,layers=0+2")
TOPICS = ("a river in flood after three days of rain", "the proof of a theorem about prime numbers", "bread with a hard crust")
TEXTS = [f"{about}. " * 40 for topic in TOPICS for about in (f"This text is about {topic}", f"Here you read of {topic}")]


def embed(model: elision.Model, texts: list[str]) -> tuple[torch.Tensor, float]:
    """The mean of the tokens of each text, of unit length, and the milliseconds of a text."""
    assert model.tokenizer is not None
    found, start = [], time.perf_counter()
    for text in texts:
        ids = torch.tensor([model.tokenizer.encode(text)[:256]])
        found.append(normalize(model(input_ids=ids)[0][0].mean(0), dim=0))
    return torch.stack(found), (time.perf_counter() - start) / len(texts) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="of an encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--passes", nargs="+", default=PASSES)
    args = parser.parse_args()
    whole: torch.Tensor | None = None
    for text in ("", *args.passes):
        model = elision.compile(args.folder or packaged(), passes=[text] if text else [])
        embed(model, TEXTS[:1])
        vectors, ms = embed(model, TEXTS)
        cosines = vectors @ vectors.T
        whole = cosines if whole is None else whole
        same, other = float(cosines[0, 1]), float(cosines[0, 2])
        print(f"{text or 'all tokens'}: {ms:.1f} ms a text; one topic {same:.3f}, two topics {other:.3f}; ", end="")
        print(f"cosines move by {float((cosines - whole).abs().max()):.3f} at most")


if __name__ == "__main__":
    main()
