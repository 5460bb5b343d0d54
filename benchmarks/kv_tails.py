"""What caches behind a tail of floats cost natively: ``python benchmarks/kv_tails.py [--context N] [--only NAME ..]``.

Processor time of one thread: of a decode step without its tick, of a tick, and of the tick that ends the prompt; then of the same
ticks by the ops on the host.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from kv_steps import rounds
from variants import variants

PASSES = {"all of it": [], "kivi": ["kivi"], "gear": ["gear"], "gear, 2 bits": ["gear:bits=2"]}


def lines(context: int, only: list[str], count: int = 128) -> Iterator[str]:
    yield "| cache | a step, ms | a tick, ms | the prompt's tick, ms | a tick on the host | the prompt's on the host |"
    yield "|---|" + "---:|" * 5
    torch.set_num_threads(1)
    names = only or list(PASSES)
    for name, model in zip(names, variants(["bf16"], (PASSES[n] for n in names), 1), strict=True):
        step, tick, prompt = rounds(model, context, count)
        cells = [f"{step:.2f}", *(f"{x:.2f}" if PASSES[name] else "" for x in (tick, prompt))]
        if PASSES[name] and model._interpreter.natives.pop(model.program.ticks[0].graph.name, None):  # type: ignore[attr-defined]
            cells += [f"{x:.1f}" for x in rounds(model, context, count)[1:]]
        yield f"| `{name}` | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    with torch.inference_mode():
        for line in lines(args.context, args.only):
            print(line, flush=True)


if __name__ == "__main__":
    main()
