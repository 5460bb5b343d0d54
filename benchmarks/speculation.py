"""Speculation against plain decoding of the same engine, on four kinds of text: what is accepted, and what it is worth.

python benchmarks/speculation.py [--formats fp32 bf16 ...] [--tokens 128] [--prompts 8] [--raw FILE.jsonl] [--output FILE]

Greedy, SmolLM2-135M-Instruct, 2 threads. For every prompt plain decoding and sets of drafters take turns. Drafters begin cold and
keep their tables from prompt to prompt; the first ``WARM`` prompts of every kind are run before the others and not counted. Two
figures: wall time of a token (plain over speculative, of the rounds after the first token; median over prompts and their
quartiles), and counted: the times that a step of n nodes took when the machine was measured, summed over the rounds, plus the
time of drafting. Tokens are compared with those of plain decoding. A text repeats itself if fewer than 80 % of its 4-grams are
different.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import elision
from elision.ir.drafting.policy import SIZES, Policy
from elision.ir.drafting.run import Drafting
from elision.runtime.generate import Stats
from elision.runtime.speculation import drafting_of

KINDS = ("chat", "summarise", "edit", "prose")
FORMATS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["bf16"],
    "int8 a8": ["int8:group=32", "a8"],
    "Q4_1 a8": ["stored", "a8"],
}
DRAFTERS = ["prompt-lookup", "pain-trie", "token-recycling", "aded"]
SETS = [(0,), (1,), (2,), (3,), (1, 2), (0, 2), (0, 1, 2, 3)]
WARM = 2
ROOT = Path(__file__).parent


def prompts(kind: str) -> list[str]:
    """The user's messages of a kind."""
    return [p.strip() for p in (ROOT / "prompts" / f"{kind}.txt").read_text().split("\n=====\n")]


@dataclass
class Sample:
    """One prompt with one set of drafters, against plain decoding just before."""

    wall: float
    counted: float
    per_round: float
    repeats: bool
    nodes: float


def repeats(text: list[int]) -> bool:
    """Whether a text says the same again and again."""
    grams = [tuple(text[i : i + 4]) for i in range(len(text) - 3)]
    return len(set(grams)) < 0.8 * len(grams)


def run(name: str, tokens: int, count: int, progress: Progress) -> tuple[dict[tuple[str, str], list[Sample]], list[float], int]:
    """Samples by (set, kind), the measured seconds of steps of `SIZES` nodes, and how many runs gave other tokens than plain
    decoding."""
    kv = "bf16" if name != "fp32" else None
    plain = elision.compile("smollm2", FORMATS[name], threads=2, kv_dtype=kv)
    drafted = elision.compile("smollm2", FORMATS[name] + DRAFTERS, threads=2, kv_dtype=kv)
    assert drafted.drafting is not None and drafted.tokenizer is not None
    times = [drafted.drafting.policy.seconds(n) for n in SIZES]
    sets: dict[str, Drafting] = {}
    for chosen in SETS:
        made = drafting_of(drafted._interpreter, "")
        assert made is not None
        policy = Policy(lambda: np.array(times))
        sets[" + ".join(DRAFTERS[i] for i in chosen)] = Drafting([made.drafters[i] for i in chosen], policy)
    task = progress.add_task(name, total=len(KINDS) * count)
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    wrong = 0
    texts = [(kind, i, message) for kind in KINDS for i, message in enumerate(prompts(kind)[:count])]
    for kind, i, message in sorted(texts, key=lambda t: t[1] >= WARM):
        ids = torch.tensor([drafted.tokenizer.encode(drafted.tokenizer.chat(message), add_special=False)])
        for turn, (label, found) in enumerate(sets.items()):
            if turn % 3 == 0:  # plain decoding's turn comes again before every third set
                expected = plain.generate(ids, max_new_tokens=tokens, temperature=0)
                before = plain.stats
            drafted.drafting = found
            out = drafted.generate(ids, max_new_tokens=tokens, temperature=0)
            stats = drafted.stats
            assert before is not None and stats is not None
            wrong += not torch.equal(out, expected)
            if i >= WARM and min(before.new_tokens, stats.new_tokens) >= 16:
                samples[label, kind].append(_sample(before, stats, found.policy, out[0, ids.shape[1] :].tolist()))
        progress.advance(task)
    return samples, times, wrong


def _sample(before: Stats, stats: Stats, policy: Policy, text: list[int]) -> Sample:
    counted = sum(policy.seconds(n) * times for n, times in stats.sizes.items()) + stats.draft_time
    tokens = stats.new_tokens - 1
    return Sample(
        before.decode_time / (before.new_tokens - 1) / (stats.decode_time / tokens),
        tokens * policy.seconds(1) / counted,
        stats.tokens_per_round,
        repeats(text),
        stats.drafted / max(stats.rounds, 1) + 1,
    )


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{statistics.median(values):.2f} ({low:.2f}-{high:.2f})"


def table(samples: dict[tuple[str, str], list[Sample]]) -> list[str]:
    """Rows by set of drafters, as markdown."""
    lines = [
        "| drafters | " + " | ".join(f"{k}: wall (quartiles), counted" for k in KINDS) + " | mean of the four: wall, counted "
        "| tokens a round | of texts that do not repeat | nodes a round |",
        "|" + "---|" * (len(KINDS) + 5),
    ]
    for label in dict.fromkeys(s for s, _ in samples):
        cells, walls, counts = [], [], []
        for kind in KINDS:
            found = samples[label, kind]
            walls.append(statistics.median(s.wall for s in found))
            counts.append(statistics.median(s.counted for s in found))
            cells.append(f"{spread([s.wall for s in found])}, {counts[-1]:.2f}")
        every = [s for kind in KINDS for s in samples[label, kind]]
        fresh = [s.per_round for s in every if not s.repeats]
        rest = f"{statistics.mean(fresh):.2f} ({len(fresh)} of {len(every)})" if fresh else "none"
        lines.append(
            f"| {label} | {' | '.join(cells)} | {statistics.mean(walls):.2f}, {statistics.mean(counts):.2f} | "
            f"{statistics.mean(s.per_round for s in every):.2f} | {rest} | {statistics.mean(s.nodes for s in every):.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--raw", type=Path, help="where samples go, a line of JSON for each format, set of drafters and kind")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    raw: list[str] = []
    lines = [f"{platform.machine()}, 2 threads, {args.tokens} tokens, {args.prompts} prompts of each kind.", ""]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for name in args.formats:
            samples, times, wrong = run(name, args.tokens, args.prompts, progress)
            steps = ", ".join(f"{n}: {t / times[0]:.2f}" for n, t in zip(SIZES, times, strict=True))
            part = [f"## {name}", "", f"A step of n nodes against one ({times[0] * 1e3:.2f} ms): {steps}.", ""]
            part += [f"Runs with other tokens than plain decoding: {wrong}.", "", *table(samples), ""]
            for (label, kind), found in samples.items():
                row = {"format": name, "drafters": label, "kind": kind, "wrong": wrong, "samples": [asdict(s) for s in found]}
                raw.append(json.dumps(row) + "\n")
            print("\n".join(part), flush=True)
            lines += part
    if args.raw:
        args.raw.write_text("".join(raw), encoding="utf-8")
    if args.output:
        args.output.write_text("\n".join(["# Speculative decoding of SmolLM2-135M-Instruct on the CPU", "", *lines]))


if __name__ == "__main__":
    main()
