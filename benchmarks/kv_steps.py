"""What eviction costs, ``python benchmarks/kv_steps.py``: processor time of a decode step and of a tick of `h2o`, one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

import elision
from elision.ir.requests import Requests
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.runtime.session import Session


def rounds(model: elision.Model, context: int, count: int = 64) -> tuple[float, float, float]:
    """Milliseconds of processor time of a round after a prompt of ``context`` tokens, without its tick, of a tick, and of the
    tick that ends the prompt."""
    ids = torch.randint(100, 40000, (context,), generator=torch.Generator().manual_seed(0))
    session, spent = Session(model._interpreter, 1, context + count + 1), [0.0]
    tick = session._tick

    def timed(rows: Any, **how: Any) -> None:
        begun = time.process_time()
        tick(rows, **how)
        spent.append(time.process_time() - begun)

    session._tick = timed  # type: ignore[method-assign]
    session.prefill([ids.tolist()])
    first, requests, last, steps = spent[-1], Requests([Request(Warp(), True, 0, 0)], [ids], [context]), 5, []
    for _ in range(count):
        begun = time.process_time()
        last = session.round({0: last}, requests)[0][-1]
        steps.append(time.process_time() - begun - spent[-1])
    every = model.program.ticks[0].every if model.program.ticks else count
    due = sorted(spent[-count:])[-(count // every) :]
    return 1e3 * statistics.median(steps), 1e3 * statistics.median(due), 1e3 * first


def steps(context: int = 2048) -> Iterator[str]:
    """Processor time of one thread, which other work on the machine changes less than the time of day."""
    yield "| cache | prompt | a step, ms | a tick, ms | attention, of the whole cache's |"
    yield "|---|---:|---:|---:|---:|"
    torch.set_num_threads(1)
    base = whole = 0.0
    for name, budget in (("all of it", 0), (f"h2o, {context // 4}", context // 4), ("h2o, nothing evicted", 8192)):
        passes = [f"h2o:budget={budget}"] if budget else []
        model = elision.compile("smollm2", passes=["bf16", *passes], kv_dtype="bf16", threads=1)
        if not passes:
            base, *_ = rounds(model, 16)
            yield f"| {name} | 16 | {base:.2f} | | |"
        step, tick, _ = rounds(model, context)
        whole = whole or step - base
        yield f"| {name} | {context} | {step:.2f} | {tick:.2f} | {(step - base) / whole:.2f} |"
        if passes:  # the same tick by the ops, on the host
            model._interpreter.natives.pop(model.program.ticks[0].graph.name)  # type: ignore[attr-defined]
            yield f"| {name}, tick on the host | {context} | | {rounds(model, context)[1]:.2f} | |"


if __name__ == "__main__":
    with torch.inference_mode():
        for line in steps():
            print(line, flush=True)
