"""What methods that read or hold a part of the cache save of a decode step, and cost in quality:
``python benchmarks/sparse_attention.py time|quality [--weights bf16|int8] [--out FILE]``.

time: milliseconds of a step of SmolLM2 at contexts of 2048 and 8000 tokens, of its attention alone (the rows of the schedule
that attend, choose, join and count, run by themselves), and bytes of state. The caches are filled with random numbers: how much
is read depends on the method's sizes, and for `tidal-decode` on how far apart the chosen tokens are, for which random keys are
the worst case. The models take turns, and the best turn of each counts (its median of attention, its mean of tokens). quality:
perplexity as `benchmarks/kv_quality.py` measures it, decoding 256 tokens after prompts of 1792.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from kv_speed import WEIGHTS
from variants import variants

import elision
from elision.ir import schedule as abi
from elision.ir.flatten import decoding
from elision.ir.requests import Requests
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.runtime.native.engine import Engine
from elision.runtime.session import Session

HALF = "+".join(map(str, range(0, 90, 2)))  # every second of SmolLM2's key heads: what is saved does not depend on which
QUARTER = "+".join(map(str, range(0, 90, 4)))
#: Whose quality is measured.
QUALITY = (
    "quest:budget=512", "quest:budget=512,page=32", "quest:budget=1024", "quest:budget=256", "tidal-decode:budget=256",
    "tidal-decode:budget=64", "tidal-decode:budget=512", "duo-attention:sparsity=0.5",
)  # fmt: skip
CONTEXTS = (2048, 8000)
ATTENTION = ("attend", "bounds", "best", "combine", "credit")  # how the names of these kernels begin
TURNS, TIMES = 6, 9  # runs of its attention in a turn
STEPS = 17  # rounds of a turn: none ends with a tick of the clock, which leaves other tokens in the engine's context


def methods(context: int) -> dict[str, list[str]]:
    """Passes by name: a quarter of the context, and other settings."""
    n = context // 4
    found = (
        f"h2o:budget={n}", f"snapkv:budget={n}", f"streaming-llm:window={n - 4}", f"quest:budget={n}",
        f"quest:budget={n},page=32", f"quest:budget={n},page=64", f"quest:budget={n},page=64,dense=0", "quest:budget=512",
        "quest:budget=1024", f"quest:budget={context}", "tidal-decode:budget=256",
    )  # fmt: skip
    heads = {"HALF": HALF, "QUARTER": QUARTER}
    return {"all of it": []} | {
        **{name: [name] for name in found},
        **{f"duo-attention:heads={name}": [f"duo-attention:heads={which}"] for name, which in heads.items()},
        f"h2o:budget={2 * context}": [f"h2o:budget={2 * context}"],
    }


def filled(model: elision.Model, context: int) -> Session:
    """A run over one sequence of ``context`` random entries."""
    session = Session(model._interpreter, 1, context + TURNS * (STEPS + TIMES))
    generator = torch.Generator().manual_seed(0)
    for store in session._stores.values():
        assert isinstance(store, KVStore)
        type, pos = store.type, torch.arange(context)
        room = store.segments[0].slots
        if room < context:  # what its clock left of them
            pos = torch.cat((pos[: room // 4], pos[-(room - room // 4) :]))
        k, v = (torch.randn(len(pos), type.heads, n, generator=generator) for n in (type.dim, type.vdim))
        store.append(Tokens(torch.zeros_like(pos), pos, 1), k, v)
    session.committed = [context]
    session._tick([0], always=True)
    session._stores = {name: store.settled(context) for name, store in session._stores.items()}
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


def timing(weights: str, threads: int, contexts: tuple[int, ...], ready: Callable[[], None] = lambda: None) -> Iterator[str]:
    """``ready`` is called before anything is measured."""
    runs: dict[tuple[int, str], tuple[elision.Model, Session]] = {}
    for context in contexts:
        chosen = methods(context)
        for name, model in zip(chosen, variants(WEIGHTS[weights], chosen.values(), threads), strict=True):
            runs[context, name] = model, filled(model, context)
            step_seconds(runs[context, name][1])
    torch.set_num_threads(1)
    ready()
    whole: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    part: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
    for _ in range(TURNS):
        for key, (model, session) in runs.items():
            whole[key].append(statistics.mean(step_seconds(session)))
            part[key].append(statistics.median(attention_seconds(engine_of(model), session)))
    yield "| context | method | attention, of all | a token, of all | attention, ms | a token, ms | state, MB |"
    yield "|---:|---|---:|---:|---:|---:|---:|"
    for (context, name), (_, session) in runs.items():
        full, plain = min(part[context, "all of it"]), min(whole[context, "all of it"])
        attention, token = min(part[context, name]), min(whole[context, name])
        ratios, size = f"{attention / full:.2f} | {token / plain:.2f}", session.bytes() / 1e6
        yield f"| {context} | `{name}` | {ratios} | {1e3 * attention:.2f} | {1e3 * token:.2f} | {size:.1f} |"


def quality(threads: int) -> Iterator[str]:
    from kv_quality import perplexity, predictions, sequences

    from elision.passes import from_text

    yield "| method | perplexity |"
    yield "|---|---:|"
    text = None
    for name, model in zip(("", *QUALITY), variants(["bf16"], ([], *([name] for name in QUALITY)), threads), strict=True):
        text = sequences(model, 4) if text is None else text
        yield f"| `{name or 'all of it'}` | {perplexity(predictions(model, text), text):.3f} |"
        if name == "duo-attention:sparsity=0.5":
            chosen: Any = from_text(next(a for a in model.program.applied if a.startswith("duo-attention")))
            others = replace(chosen, heads=tuple({*range(2 * len(chosen.heads))} - {*chosen.heads}))
            (other,) = variants(["bf16"], [[others.text()]], threads)
            yield f"| `duo-attention`, its other half of the heads whole | {perplexity(predictions(other, text), text):.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["time", "quality"])
    parser.add_argument("--out", help="file to append to")
    parser.add_argument("--weights", choices=[*WEIGHTS], default="bf16", help="of time")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with torch.inference_mode():
        for line in timing(args.weights, args.threads, CONTEXTS) if args.what == "time" else quality(args.threads):
            print(line, flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
