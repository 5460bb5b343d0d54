"""What methods that read a part of the cache save of a decode step, and cost in quality:
``python benchmarks/sparse_attention.py compile|time|quality DIRECTORY [--out FILE]``.

compile: SmolLM2 with each method as an artefact, so that a measurement begins at once. time: milliseconds of a step at contexts
of 2048 and 8000 tokens, of its attention alone (the rows of the schedule that attend, choose and join, run by themselves), and
bytes of state. The caches are filled with random numbers: how much is read depends on the method's sizes, and for `tidal-decode`
on how far apart the chosen tokens are, for which random keys are the worst case. quality: perplexity as `benchmarks/kv.py`
measures it, decoding 256 tokens after prompts of 1792.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import elision
from elision.ir import schedule as abi
from elision.ir.flatten import decoding
from elision.ir.requests import Requests
from elision.ir.states import Budget
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.runtime.native.engine import Engine
from elision.runtime.session import Session

HALF = "+".join(map(str, range(0, 90, 2)))  # every second of SmolLM2's key heads: what is saved does not depend on which
METHODS = {
    "all of it": [],
    "quest:budget=512": ["quest:budget=512"],
    "quest:budget=1024": ["quest:budget=1024"],
    "quest:budget=2048": ["quest:budget=2048"],
    "tidal-decode:budget=256": ["tidal-decode:budget=256"],
    "duo-attention:heads=HALF": [f"duo-attention:heads={HALF}"],
}
#: Whose quality is measured too.
MORE = ("duo-attention:sparsity=0.5", "quest:budget=256", "tidal-decode:budget=64", "tidal-decode:budget=512")
CONTEXTS = (2048, 8000)
ATTENTION = ("attend", "bounds", "best", "combine")  # how the names of these kernels begin
STEPS, TIMES = 32, 25


def path(directory: Path, name: str) -> Path:
    return directory / (name.replace(":", "-").replace(" ", "-") + ".elision")


def prepare(directory: Path) -> Iterator[str]:
    for name, passes in {**METHODS, **{name: [name] for name in MORE}}.items():
        if not path(directory, name).exists():
            elision.compile("smollm2", passes=["bf16", *passes], kv_dtype="bf16").save(path(directory, name))
        yield name


def filled(model: elision.Model, context: int) -> Session:
    """A run over one sequence of ``context`` random entries."""
    session = Session(model._interpreter, 1, context + STEPS + TIMES)
    generator = torch.Generator().manual_seed(0)
    for name, store in session._stores.items():
        assert isinstance(store, KVStore)
        type, pos = store.type, torch.arange(context)
        if isinstance(type.main[0].slots, Budget):  # what its clock left of them
            pos = pos[-type.main[0].slots.n // 2 :]
        k, v = (torch.randn(len(pos), type.heads, n, generator=generator) for n in (type.dim, type.vdim))
        store.append(Tokens(torch.zeros_like(pos), pos, 1), k, v)
        session._stores[name] = store.settled(context)
    session.committed = [context]
    session._tick([0], always=True)
    return session


def step_seconds(session: Session) -> list[float]:
    """Of `STEPS` tokens, with what the clock does between them."""
    requests = Requests([Request(Warp(), True, 0, 0)], [torch.zeros(1, dtype=torch.int64)], [0])
    found = []
    for i in range(STEPS):
        start = time.perf_counter()
        session.round({0: 100 + i}, requests)
        found.append(time.perf_counter() - start)
    return found


def attention_seconds(engine: Engine, session: Session) -> list[float]:
    """Of the rows of a step that read the cache, on what the last step left in its buffers."""
    schedule = engine.schedules[decoding("step")]
    table = engine.table(schedule, [1] * len(schedule.axes))
    rows = [i for i, row in enumerate(schedule.rows) if row.kernel.startswith(ATTENTION)]
    words = np.concatenate((table.words[rows], np.zeros((1, abi.WORDS), np.int64)))
    described, context = engine.describe(schedule, session._stores), engine.context
    context[abi.TABLE], context[abi.STATES] = words.ctypes.data, described.ctypes.data
    found = []
    for _ in range(TIMES):
        start = time.perf_counter()
        engine.launch(0)
        found.append(time.perf_counter() - start)
    return found


def engine_of(model: elision.Model) -> Engine:
    native: Any = next(iter(model._interpreter.natives.values()))
    return native.func.__self__  # type: ignore[no-any-return]


def timing(directory: Path, threads: int) -> Iterator[str]:
    models = {name: elision.load(path(directory, name), threads=threads) for name in METHODS}
    yield "| context | method | attention, ms | of all | a token, ms | state, MB |"
    yield "|---:|---|---:|---:|---:|---:|"
    for context in CONTEXTS:
        runs = {name: filled(model, context) for name, model in models.items()}
        whole: dict[str, list[float]] = {name: [] for name in runs}
        part: dict[str, list[float]] = {name: [] for name in runs}
        for name, session in runs.items():
            whole[name] += step_seconds(session)
            part[name] += attention_seconds(engine_of(models[name]), session)
        full = statistics.median(part["all of it"])
        for name, session in runs.items():
            attention, token = statistics.median(part[name]), statistics.mean(whole[name][1:])
            ratio, size = attention / full, session.bytes() / 1e6
            yield f"| {context} | `{name}` | {1e3 * attention:.2f} | {ratio:.2f} | {1e3 * token:.2f} | {size:.1f} |"


def quality(directory: Path) -> Iterator[str]:
    from kv import perplexity, sequences

    from elision.passes import from_text

    yield "| method | perplexity |"
    yield "|---|---:|"
    text = None
    for name in (*METHODS, *MORE):
        model = elision.load(path(directory, name))
        text = sequences(model) if text is None else text
        yield f"| `{name}` | {perplexity(model, text):.3f} |"
        if name == "duo-attention:sparsity=0.5":
            chosen: Any = from_text(next(a for a in model.program.applied if a.startswith("duo-attention")))
            others = replace(chosen, heads=tuple({*range(2 * len(chosen.heads))} - {*chosen.heads}))
            model = elision.compile("smollm2", passes=["bf16", others], kv_dtype="bf16")
            yield f"| `duo-attention`, its other half of the heads whole | {perplexity(model, text):.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["compile", "time", "quality"])
    parser.add_argument("directory", type=Path, help="of the artefacts")
    parser.add_argument("--out", help="file to append to")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1 if args.what == "time" else args.threads)
    make = {"compile": prepare, "time": lambda directory: timing(directory, args.threads), "quality": quality}[args.what]
    with torch.inference_mode():
        for line in make(args.directory):
            print(line, flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
