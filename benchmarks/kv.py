"""What compressed caches cost in quality, time and memory: ``python benchmarks/kv.py quality|rounding|steps [--out FILE]``.

quality: perplexity of the last 256 tokens of sequences of 2048 (every second topic of Python's documentation, which no pass is
calibrated on) after a prompt of the first 1792, for caches of a share of the prompt, beside random eviction, recent tokens only,
and the whole cache. rounding: the same for caches that hold everything, in fewer bits. steps: processor time of a decode step and
of an eviction. Speed is measured by `kv_speed.py` and `sparse_attention.py`.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

import elision
from elision.ir.layout import row_bytes
from elision.ir.program import Program
from elision.ir.requests import Requests
from elision.ir.states import KV, Budget
from elision.ir.tokens import Tokens
from elision.ir.value import Builder, Value
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.passes.base import Pass, register
from elision.passes.calibration import topics
from elision.passes.kv.caches import Cached
from elision.runtime.session import Session

CONTEXT, NEW, ROWS = 2048, 256, 4
SHARES = (1.0, 0.5, 0.25, 0.125)


@register
@dataclass(frozen=True)
class RandomEviction(Pass):
    """Keep ``budget`` entries whose positions a fixed function shuffles, and the last 32: what every method must beat."""

    budget: int = 1024

    name: ClassVar[str] = "random"
    family: ClassVar[str] = "kv"
    changes: ClassVar[str] = "cache"

    def apply(self, program: Program) -> None:
        cached = Cached(program, self.name)
        cached.become(Budget(self.budget + 16, -1))

        def evict(b: Builder, rows: Value, cache: Value, pos: Value) -> Value:
            real = b.add("map", pos, expr="x0", dtype="f32")
            noise = b.add("map", real, expr="sin(x0 * 12.9898) * 43758.5453 - floor(sin(x0 * 12.9898) * 43758.5453)")
            return b.add("select", cache, b.add("keep", noise, pos, n=self.budget, recent=32), rows)  # type: ignore[no-any-return]

        cached.on_tick(16, evict)


def methods(budget: int) -> dict[str, list[str]]:
    """Passes by name, at a budget of tokens."""
    return {
        "random": [f"random:budget={budget}"],
        "recent only": [f"streaming-llm:window={budget},sinks=0"],
        "streaming-llm": [f"streaming-llm:window={budget - 4}"],
        "h2o": [f"h2o:budget={budget},recent={budget // 2}"],
        "h2o per layer": [f"h2o:budget={budget},recent={budget // 2},per_head=false"],
        "a2sf": [f"a2sf:budget={budget},recent=32,alpha=0.95"],
        "a2sf per layer": [f"a2sf:budget={budget},recent=32,alpha=0.95,per_head=false"],
        "keyformer": [f"keyformer:budget={budget},recent={budget // 2}"],
        "ems": [f"ems:budget={budget}"],
        "ems, nothing merged": [f"ems:budget={budget},rho=0"],
        "snapkv": [f"snapkv:budget={budget}"],
    }


@dataclass
class Forced(Requests):
    """Gives every sequence the tokens that it is told, and adds up how unlikely they were."""

    targets: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    loss: list[float] = field(default_factory=list)

    def verify(
        self, ids: torch.Tensor, logits: torch.Tensor, best: torch.Tensor, at: Tokens, drafted: Any = None, rule: Any = None
    ) -> tuple[list[list[int]], torch.Tensor]:
        wanted = self.targets[torch.arange(len(at.row)), at.pos + 1]
        loss = -logits.float().log_softmax(-1).gather(1, wanted[:, None])
        self.loss += loss[:, 0].tolist()
        return [[0]] * len(at.row), wanted


def sequences(model: elision.Model) -> torch.Tensor:
    ids = torch.tensor(model.tokenizer.encode(topics(1)))  # type: ignore[union-attr]
    parts = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return parts[:: len(parts) // ROWS][:ROWS]


def perplexity(model: elision.Model, text: torch.Tensor) -> float:
    """Of the last `NEW` tokens of the rows of ``text``, read one by one after the prompt."""
    session = Session(model._interpreter, len(text), CONTEXT)
    session.prefill(text[:, : CONTEXT - NEW].tolist())
    items = [Request(Warp(), True, 0, r) for r in range(len(text))]
    requests = Forced(items, list(text), [CONTEXT - NEW] * len(text), targets=text)
    for i in range(CONTEXT - NEW, CONTEXT - 1):
        session.round({r: int(text[r, i]) for r in range(len(text))}, requests)
    return math.exp(statistics.mean(requests.loss))


def quality(only: list[str]) -> Iterator[str]:
    yield "| cache | " + " | ".join(f"{share:.1%}" for share in SHARES) + " |"
    yield "|---|" + "---:|" * len(SHARES)
    whole = elision.compile("smollm2", passes=["bf16"], max_batch=ROWS)
    text = sequences(whole)
    full = perplexity(whole, text)
    yield f"| all of it | {full:.3f} |" + " |" * (len(SHARES) - 1)
    for name in only or methods(1024):
        found = []
        for share in SHARES[1 if only else 0 :]:
            passes = methods(int((CONTEXT - NEW) * share) if share < 1 else CONTEXT)[name]
            found.append(perplexity(elision.compile("smollm2", passes=["bf16", *passes], max_batch=ROWS), text))
        yield f"| `{name}` | " + " | ".join(f"{x:.3f}" for x in found) + " |"
    for passes in () if only else (["kv-quant:bits=8"], ["h2o:budget=896,recent=448", "kv-quant:bits=8"]):
        found = [perplexity(elision.compile("smollm2", passes=["bf16", *passes], max_batch=ROWS), text)]
        yield f"| `{' '.join(passes)}` | {found[0]:.3f} ({found[0] / full - 1:+.2%}) |" + " |" * (len(SHARES) - 1)


ROUNDED = (
    "kv-quant:bits=8", "kv-quant:bits=4", "kv-quant:bits=4,group=32", "kivi:bits=8,group=32,residual=32",
    "kivi:bits=4,group=32,residual=32", "kivi:bits=2,group=32,residual=32", "kivi:bits=2,group=32,residual=128", "gear:bits=4",
    "gear:bits=2", "gear:bits=2,outliers=0",
)  # fmt: skip


def rounding(rows: int, chosen: list[str]) -> Iterator[str]:
    yield "| cache | bits per number | perplexity | change |"
    yield "|---|---:|---:|---:|"
    text, full = None, 0.0
    for name in ("", *(chosen or ROUNDED)):
        model = elision.compile("smollm2", passes=["bf16", *([name] if name else [])], max_batch=rows)
        text = sequences(model)[:rows] if text is None else text
        types = [t for t in model.program.states.values() if isinstance(t, KV)]
        bits = 8 * sum(row_bytes(t) for t in types) / sum(t.heads * (t.dim + t.vdim) for t in types)
        found = perplexity(model, text)
        full = full or found
        yield f"| {f'`{name}`' if name else 'all of it, float32'} | {bits:.2f} | {found:.3f} | {found / full - 1:+.2%} |"


def rounds(model: elision.Model, context: int, count: int = 64) -> tuple[float, float]:
    """Milliseconds of processor time of a round after a prompt of ``context`` tokens, without its tick, and of a tick."""
    ids = torch.randint(100, 40000, (context,), generator=torch.Generator().manual_seed(0))
    session, spent = Session(model._interpreter, 1, context + count + 1), [0.0]
    session.prefill([ids.tolist()])
    tick = session._tick

    def timed(rows: Any, **how: Any) -> None:
        begun = time.process_time()
        tick(rows, **how)
        spent.append(time.process_time() - begun)

    session._tick = timed  # type: ignore[method-assign]
    requests, last, steps = Requests([Request(Warp(), True, 0, 0)], [ids], [context]), 5, []
    for _ in range(count):
        begun = time.process_time()
        last = session.round({0: last}, requests)[0][-1]
        steps.append(time.process_time() - begun - spent[-1])
    ticks = sorted(spent)[-count // 16 :]
    return 1e3 * statistics.median(steps), 1e3 * statistics.median(ticks)


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
            base, _ = rounds(model, 16)
            yield f"| {name} | 16 | {base:.2f} | | |"
        step, tick = rounds(model, context)
        whole = whole or step - base
        yield f"| {name} | {context} | {step:.2f} | {tick:.2f} | {(step - base) / whole:.2f} |"
        if passes:  # the same tick by the ops, on the host
            model._interpreter.natives.pop(model.program.ticks[0].graph.name)  # type: ignore[attr-defined]
            yield f"| {name}, tick on the host | {context} | | {rounds(model, context)[1]:.2f} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["quality", "rounding", "steps"])
    parser.add_argument("--out", help="file to append to")
    parser.add_argument("--only", nargs="*", default=[], help="methods; the whole cache is then not a share")
    parser.add_argument("--rows", type=int, default=ROWS, help="sequences, of rounding")
    parser.add_argument("--methods", nargs="*", default=[], help="passes, of rounding")
    args = parser.parse_args()
    chosen = {
        "quality": lambda: quality(args.only),
        "rounding": lambda: rounding(args.rows, args.methods),
        "steps": steps,
    }
    lines = chosen[args.what]()
    begun = time.perf_counter()
    with torch.inference_mode():
        for line in lines:
            print(line, flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(line + "\n")
    print(f"{time.perf_counter() - begun:.0f} s on {platform.machine()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
