"""The speed-up that passes were asked for, and the one that decoding has: SmolLM2 on native code, models taking turns.

python benchmarks/layer_speed.py [--target 1.1 1.25 1.5] [--weights int8] [--threads 1] [--turns 5] [--wall] [--output FILE.md]

Each model generates ``--tokens`` after a prompt of one, greedily, through `Model.generate`; every few tokens it is the next one's
turn. Seconds are of the processor, of the thread that generates, so that other load counts little. How much faster a model is
than the whole one in such a stretch of the text is the median over ``--turns`` texts; its speed-up is that of all stretches.
Models read the weights that they share from the same memory: where these lie changes times more than a layer does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Semaphore, Thread

import numpy as np
import torch
from output import give
from rich.console import Console

import elision

STRETCH = 8


def in_turns(
    models: Sequence[elision.Model], prompt: Sequence[int], tokens: int, clock: Callable[[], float] = time.thread_time
) -> np.ndarray:
    """Seconds of a token after a prompt, by the clock of the thread that asks for it, by model and stretch: the median in the
    stretch."""
    batons = [Semaphore(0) for _ in models]
    seen: list[list[list[float]]] = [[] for _ in models]

    def work(i: int) -> None:
        times: list[float] = []

        def token(*told: object) -> None:
            times.append(clock())
            if len(times) == STRETCH + 1:
                seen[i].append(np.diff(times).tolist())
                times.clear()
                batons[(i + 1) % len(models)].release()
                batons[i].acquire()

        batons[i].acquire()
        models[i].generate(torch.tensor([list(prompt)]), max_new_tokens=tokens, temperature=0, eos_token_id=[], streamer=token)
        batons[(i + 1) % len(models)].release()

    threads = [Thread(target=work, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    batons[0].release()
    for thread in threads:
        thread.join()
    return np.median(np.array(seen), axis=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=float, nargs="+", default=[1.1, 1.25, 1.5])
    parser.add_argument("--weights", default="int8", help="passes that say how weights are stored (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--wall", action="store_true", help="seconds of a clock on the wall")
    parser.add_argument("--output", type=Path, help="where the markdown goes (default: standard output)")
    args = parser.parse_args()

    console = Console(stderr=True, soft_wrap=True)
    methods = ("unified-skip:speedup={}", f"skipdecode:speedup={{}},length={args.tokens}")
    asked = {"": 1.0} | {method.format(target): target for method in methods for target in args.target}
    models = {}
    for text in asked:
        made = elision.compile("smollm2", passes=[*filter(None, [text]), *args.weights.split()], threads=args.threads)
        models[text] = elision.Model(
            made.program, models[""].weights.of(made.program) if models else made.weights, tokenizer=None, defaults={},
            coverage={}, max_context=made.max_context, threads=args.threads, native=made.native,
        )  # fmt: skip
        console.print(f"{text}: {models[text].program.applied}")
    turns, clock = [], time.perf_counter if args.wall else time.thread_time
    for turn in range(args.turns):
        turns.append(in_turns([*models.values()], [1], args.tokens, clock))
        console.print(f"turn {turn + 1} of {args.turns}: " + ", ".join(f"{1e3 * t:.2f}" for t in turns[-1].mean(1)))
    seconds = np.array(turns)  # turns, models, stretches
    whole = np.median(seconds[:, 0], axis=0)
    own = whole * np.median(seconds / seconds[:, :1], axis=0)
    what = "on the wall" if args.wall else "of the processor"
    lines = [f"SmolLM2-135M-Instruct, {args.weights or 'weights of 32 bits'}, {args.threads} threads, {args.tokens} tokens,"]
    lines += [f"seconds {what}, {args.turns} turns", ""]
    lines += ["| pass | asked for | ms a token | speed-up | of what was asked |", "|---|---|---|---|---|"]
    for (text, target), found in zip(asked.items(), own, strict=True):
        name, gain = text.partition(":")[0], whole.sum() / found.sum()
        chosen = next((f"`{t}`" for t in models[text].program.applied if name and t.startswith(name)), "as it is")
        lines.append(f"| {chosen} | {target} | {1e3 * found.mean():.2f} | {gain:.3f} | {gain / target:.1%} |")
    text = "\n".join(lines) + "\n"
    give(text, args.output)


if __name__ == "__main__":
    main()
