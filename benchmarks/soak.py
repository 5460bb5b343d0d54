"""Thousands of tokens from one native model: random prompts, lengths and batches, calls that are cancelled in the middle.

    python benchmarks/soak.py [MODEL] [-p PASS]... [--tokens 20000] [--checked 0.05] [--seed 0]

Greedy tokens of a random part of the rows are compared with the logits of the reference interpreter over the whole row: a token
is wrong if its logit is more than 1e-3 of the largest below the best. Memory (`Pss_Anon` of /proc/self/smaps_rollup, what
belongs to this process alone) is read after every call; the last quarter of the calls may not need more than the second one.
Exit status 1 for a wrong token or for memory that grows.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from typing import Any

import torch
from memory import anonymous
from rich.console import Console
from rich.progress import Progress

import elision

LONGEST_PROMPT, MOST_NEW, MOST_ROWS = 400, 200, 4
GROWTH = 4e6  # bytes that the allocator may keep or give back


class Cancel:
    """Ends every row after its own number of tokens."""

    def __init__(self, after: list[int]) -> None:
        self._left = list(after)

    def __call__(self, row: int, tokens: list[int], text: str) -> bool:
        self._left[row] -= len(tokens)
        return self._left[row] > 0


def wrong(reference: Any, row: torch.Tensor, prompt: int) -> int:
    """How many tokens after the prompt are not the best ones."""
    logits = reference(row[None]).logits[0, prompt - 1 : -1]
    best = logits.max(-1).values
    found = logits.gather(-1, row[prompt:, None])[:, 0]
    return int((best - found > 1e-3 * logits.abs().amax(-1)).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("-p", "--passes", action="append", default=[])
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--checked", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance = random.Random(args.seed)
    model = elision.compile(args.model, passes=args.passes)
    reference = elision.compile(args.model, passes=args.passes, target="reference")
    vocabulary = int(model.program.meta["vocab"])
    console = Console()
    done = calls = cancelled = checked = bad = 0
    memory: list[int] = []
    start = time.perf_counter()
    with Progress(console=console) as progress:
        task = progress.add_task("tokens", total=args.tokens)
        while done < args.tokens:
            lengths = [chance.randint(1, LONGEST_PROMPT) for _ in range(chance.randint(1, MOST_ROWS))]
            new = chance.randint(1, MOST_NEW)
            ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for r, n in enumerate(lengths):
                ids[r, -n:] = torch.tensor(chance.choices(range(vocabulary), k=n))
                mask[r, -n:] = 1
            stop = [chance.randint(1, new) if chance.random() < 0.3 else new for _ in lengths]
            sampled = chance.random() < 0.3
            options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": calls} if sampled else {"do_sample": False}
            found = model.generate(ids, mask, max_new_tokens=new, eos_token_id=[], streamer=Cancel(stop), **options)
            done, calls = done + sum(stop), calls + 1
            cancelled += sum(s < new for s in stop)
            for r, n in enumerate(lengths):
                if not sampled and chance.random() < args.checked:
                    row = found[r, max(lengths) - n : max(lengths) + stop[r]]
                    bad += wrong(reference, row, n)
                    checked += stop[r]
            gc.collect()
            memory.append(anonymous())
            progress.update(task, completed=done)
    quarter = max(1, len(memory) // 4)
    early, late = statistics.median(memory[quarter : 2 * quarter] or memory), statistics.median(memory[-quarter:])
    console.print(
        f"{model.program.name} {' '.join(args.passes)}: {done} tokens in {calls} calls and {time.perf_counter() - start:.0f} s, "
        f"{cancelled} rows cancelled; {checked} greedy tokens compared with the interpreter's logits, {bad} wrong; memory "
        f"{early / 1e6:.1f} MB in the second quarter of the calls, {late / 1e6:.1f} MB in the last, peak "
        f"{max(memory) / 1e6:.1f} MB"
    )
    sys.exit(1 if bad or late > early + GROWTH else 0)


if __name__ == "__main__":
    main()
