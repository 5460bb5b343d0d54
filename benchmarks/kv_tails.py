"""What caches behind a tail of floats cost natively: ``python benchmarks/kv_tails.py [--context N] [--only NAME ..]``.

Processor time of one thread: of a decode step without its tick, of a tick, and of the tick that ends the prompt; then of the same
ticks by the ops on the host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from variants import variants

import elision
from elision.ir.requests import Requests
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.runtime.session import Session

PASSES = {"all of it": [], "kivi": ["kivi"], "gear": ["gear"], "gear, 2 bits": ["gear:bits=2"]}


def spent(model: elision.Model, context: int, count: int) -> tuple[float, float, float]:
    """Milliseconds of a round, of its tick, and of the tick after a prompt of ``context`` tokens."""
    ids = torch.randint(100, 40000, (context,), generator=torch.Generator().manual_seed(0))
    session, ticks = Session(model._interpreter, 1, context + count + 1), [0.0]
    tick = session._tick

    def timed(rows: Any, **how: Any) -> None:
        begun = time.process_time()
        tick(rows, **how)
        ticks.append(time.process_time() - begun)

    session._tick = timed  # type: ignore[method-assign]
    session.prefill([ids.tolist()])
    first, requests, last, steps = ticks[-1], Requests([Request(Warp(), True, 0, 0)], [ids], [context]), 5, []
    for _ in range(count):
        begun = time.process_time()
        last = session.round({0: last}, requests)[0][-1]
        steps.append(time.process_time() - begun - ticks[-1])
    every = model.program.ticks[0].every if model.program.ticks else count
    due = sorted(ticks[-count:])[-(count // every) :]
    return 1e3 * statistics.median(steps), 1e3 * statistics.median(due), 1e3 * first


def lines(context: int, only: list[str], count: int = 128) -> Iterator[str]:
    yield "| cache | a step, ms | a tick, ms | the prompt's tick, ms | a tick on the host | the prompt's on the host |"
    yield "|---|" + "---:|" * 5
    torch.set_num_threads(1)
    names = only or list(PASSES)
    for name, model in zip(names, variants(["bf16"], (PASSES[n] for n in names), 1), strict=True):
        step, tick, prompt = spent(model, context, count)
        cells = [f"{step:.2f}", *(f"{x:.2f}" if PASSES[name] else "" for x in (tick, prompt))]
        if PASSES[name] and model._interpreter.natives.pop(model.program.ticks[0].graph.name, None):  # type: ignore[attr-defined]
            cells += [f"{x:.1f}" for x in spent(model, context, count)[1:]]
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
