"""What compressed caches cost in quality: ``python benchmarks/kv_quality.py budgets|bits|facts [--only NAME ..] [--rows N]``.

Perplexity of the last 256 tokens of sequences of 2048 (every second topic of Python's documentation, which no pass is calibrated
on), read one by one after a prompt of the first 1792, and the mean Kullback-Leibler divergence of their distributions from the
whole cache's, in nats. budgets: caches that hold, or steps that read, a share of the prompt, beside random eviction and recent
tokens only. bits: caches that hold everything, in fewer bits. facts: how many of four codes the model still says that were
planted into the middle of 1200 tokens of other text.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from chart import chart

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

CONTEXT, NEW = 2048, 256
PROMPT = CONTEXT - NEW
SHARES = (0.5, 0.25, 0.125)
FACTS = (("green", "7319"), ("red", "2846"), ("yellow", "5072"), ("white", "9164"))


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


def methods(share: float, prompt: int = PROMPT) -> dict[str, str]:
    """Passes by name that hold, or read in a step, this share of the entries of a prompt."""
    n = int(prompt * share)
    sinks, window = (64, 256) if share > 0.2 else (16, 128)
    streaming = min((1 - share) / (1 - (sinks + window) / prompt), 1)  # the share of heads whose caches are short
    return {
        "random": f"random:budget={n}",
        "recent only": f"streaming-llm:window={n},sinks=0",
        "streaming-llm": f"streaming-llm:window={n - 4}",
        "h2o": f"h2o:budget={n},recent={n // 2}",
        "h2o per layer": f"h2o:budget={n},recent={n // 2},per_head=false",
        "a2sf": f"a2sf:budget={n},recent=32,alpha=0.95",
        "a2sf per layer": f"a2sf:budget={n},recent=32,alpha=0.95,per_head=false",
        "keyformer": f"keyformer:budget={n},recent={n // 2}",
        "snapkv": f"snapkv:budget={n}",
        "snapkv, pool of 13": f"snapkv:budget={n},pool=13",
        "ems": f"ems:budget={n}",
        "ems, nothing merged": f"ems:budget={n},rho=0",
        "duo-attention": f"duo-attention:sparsity={streaming:.3f},sinks={sinks},window={window}",
        "quest": f"quest:budget={n}",
        "quest, pages of 64": f"quest:budget={n},page=64",
        "quest, pages of 64 in all layers": f"quest:budget={n},page=64,dense=0",
        "tidal-decode": f"tidal-decode:budget={n}",
    }


@dataclass
class Forced(Requests):
    """Gives every sequence the tokens that it is told, and keeps what the model thought of every next one."""

    targets: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    found: list[torch.Tensor] = field(default_factory=list)

    def verify(
        self, ids: torch.Tensor, logits: torch.Tensor, best: torch.Tensor, at: Tokens, drafted: Any = None, rule: Any = None
    ) -> tuple[list[list[int]], torch.Tensor]:
        self.found.append(logits.float().log_softmax(-1))
        return [[0]] * len(at.row), self.targets[torch.arange(len(at.row)), at.pos + 1]


def sequences(model: elision.Model, rows: int) -> torch.Tensor:
    ids = torch.tensor(model.tokenizer.encode(topics(1)))  # type: ignore[union-attr]
    parts = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return parts[:: len(parts) // 4][:rows]


def predictions(model: elision.Model, text: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[NEW - 1, rows, vocab]`` of the tokens that follow, read one by one after the prompt."""
    session = Session(model._interpreter, len(text), CONTEXT)
    session.prefill(text[:, :PROMPT].tolist())
    items = [Request(Warp(), True, 0, r) for r in range(len(text))]
    requests = Forced(items, list(text), [PROMPT] * len(text), targets=text)
    for i in range(PROMPT, CONTEXT - 1):
        session.round({r: int(text[r, i]) for r in range(len(text))}, requests)
    return torch.stack(requests.found)


def perplexity(found: torch.Tensor, text: torch.Tensor) -> float:
    return math.exp(-found.gather(2, text[:, PROMPT + 1 :].T[..., None]).mean())


def divergence(found: torch.Tensor, full: torch.Tensor) -> float:
    """Of ``found`` from ``full``, in nats a token."""
    return statistics.mean(float((f.exp() * (f - g)).sum(-1).mean()) for f, g in zip(full, found, strict=True))


def compiled(rows: int, *passes: str) -> elision.Model:
    return elision.compile("smollm2", passes=["bf16", *passes], max_batch=rows, threads=1)


def budgets(rows: int, only: list[str], save: Path | None) -> Iterator[str]:
    whole = compiled(rows)
    text = sequences(whole, rows)
    full = predictions(whole, text)
    yield f"The whole cache: {perplexity(full, text):.3f}."
    yield ""
    yield "| cache | " + " | ".join([f"{s:.1%}" for s in SHARES] + [f"KL, {s:.1%}" for s in SHARES]) + " |"
    yield "|---|" + "---:|" * (2 * len(SHARES))
    lines: dict[str, dict[float, float]] = {}
    for name in only or methods(0.5):
        made = [predictions(compiled(rows, methods(share)[name]), text) for share in SHARES]
        scores, apart = [perplexity(m, text) for m in made], [divergence(m, full) for m in made]
        lines[name] = {100 * s: x for s, x in zip(SHARES, apart, strict=True)}
        yield f"| `{name}` | " + " | ".join(f"{x:.3f}" for x in (*scores, *apart)) + " |"
        if save:
            save.write_text(chart("share of the prompt's entries, %", "divergence from the whole cache, nats", lines))


ROUNDED = (
    "kv-quant:bits=8", "kv-quant:bits=4", "kv-quant:bits=4,group=32", "kivi:bits=8,group=32,residual=32",
    "kivi:bits=4,group=32,residual=32", "kivi:bits=2,group=32,residual=32", "kivi:bits=2,group=32,residual=128", "gear:bits=4",
    "gear:bits=2", "gear:bits=2,outliers=0",
)  # fmt: skip


def bits(rows: int, only: list[str]) -> Iterator[str]:
    yield "| cache | bits per number | perplexity | change | KL |"
    yield "|---|---:|---:|---:|---:|"
    text = full = torch.empty(0)
    for name in ("", *(only or ROUNDED)):
        model = compiled(rows, *([name] if name else []))
        types = [t for t in model.program.states.values() if isinstance(t, KV)]
        size = 8 * sum(row_bytes(t) for t in types) / sum(t.heads * (t.dim + t.vdim) for t in types)
        if not name:
            text = sequences(model, rows)
            full = predictions(model, text)
            yield f"| all of it, float32 | {size:.2f} | {perplexity(full, text):.3f} | | |"
            continue
        found = predictions(model, text)
        change = perplexity(found, text) / perplexity(full, text) - 1
        yield f"| `{name}` | {size:.2f} | {perplexity(found, text):.3f} | {change:+.2%} | {divergence(found, full):.4f} |"


def planted(model: elision.Model, colour: str, code: str) -> str:
    """A fact in the middle of other text, and the beginning of a sentence that asks for it."""
    assert model.tokenizer is not None
    words = model.tokenizer.encode(topics(1))
    half = [model.tokenizer.decode(words[i : i + 600]) for i in (0, 600)]
    return f"{half[0]}\nRemember this: the code of the {colour} door is {code}.\n{half[1]}\nThe code of the {colour} door is"


def facts(only: list[str]) -> Iterator[str]:
    whole = compiled(1)
    prompts = [(planted(whole, *fact), fact[1]) for fact in FACTS]

    def found(model: elision.Model) -> int:
        return sum(code in str(model.generate(text, max_new_tokens=6, do_sample=False)) for text, code in prompts)

    yield f"The whole cache: {found(whole)} of {len(FACTS)}."
    yield ""
    yield "| cache | " + " | ".join(f"{s:.1%}" for s in SHARES) + " |"
    yield "|---|" + "---:|" * len(SHARES)
    for name in only or methods(0.5):
        counts = [found(compiled(1, methods(share, 1226)[name])) for share in SHARES]
        yield f"| `{name}` | " + " | ".join(map(str, counts)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["budgets", "bits", "facts"])
    parser.add_argument("--only", nargs="*", default=[], help="names of methods, or of bits passes")
    parser.add_argument("--rows", type=int, default=4, help="sequences")
    parser.add_argument("--save", type=Path, help="a file for the picture of budgets (SVG)")
    args = parser.parse_args()
    begun = time.perf_counter()
    with torch.inference_mode():
        made = {"budgets": lambda: budgets(args.rows, args.only, args.save), "bits": lambda: bits(args.rows, args.only)}
        for line in made.get(args.what, lambda: facts(args.only))():
            print(line, flush=True)
    print(f"{time.perf_counter() - begun:.0f} s on {platform.machine()}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
