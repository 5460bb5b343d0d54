"""What torch.compile(model, backend="elision") gains: a call of all-MiniLM-L6-v2, of a vision transformer on scikit-learn's
digits and of SmolLM2's forward, and a step of its `generate` on transformers' static cache, against eager and Inductor.

python benchmarks/torch_compile.py [--rounds 30] [--output FILE.md]

Engines take turns, call by call; the median and the fastest call. Every engine has compiled, and has been called, before the
clock runs. Differences are from eager, of the largest value. Weights and activations are float32, threads those of torch.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from elision.backend import elision as backend
from elision.backend import report
from elision.frontend.source import load_source

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo import Clock  # noqa: E402
from torch_compile_backend import packaged  # noqa: E402

console = Console(stderr=True, soft_wrap=True)
MOST = 6.0  # seconds of a case, after which there are no more rounds


def minilm() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    model = transformers.AutoModel.from_pretrained(packaged()).eval()
    for rows, length in ((1, 16), (1, 128), (8, 64)):
        ids = torch.randint(1000, 20000, (rows, length), generator=torch.Generator().manual_seed(0))
        yield f"MiniLM, {rows} of {length} tokens", model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def digits() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """The model of tests/passes/test_vit_digits.py, untrained (weights do not change how long it takes), whose heads of 12
    channels have no native attention, and the same with heads of 16 channels."""
    for heads in (3, 4):
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(hidden_size=48, num_hidden_layers=6, num_attention_heads=heads, intermediate_size=96)
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=4, num_labels=10)
        model = transformers.ViTForImageClassification(config).eval()
        for rows in (1, 8):
            yield f"ViT on digits, heads of {48 // heads} channels, {rows}", model, {"pixel_values": torch.randn(rows, 3, 32, 32)}


def smollm2() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    model = load_source("smollm2").model
    ids = torch.randint(100, 40000, (1, 64), generator=torch.Generator().manual_seed(0))
    yield "SmolLM2 forward, 64 tokens", model, {"input_ids": ids, "use_cache": False}


class Prepared:
    """A case whose engines have compiled, and have been called three times."""

    def __init__(self, name: str, model: Any, given: dict[str, Any]) -> None:
        self.name, self.given = name, given
        self.engines: dict[str, Callable[..., Any]] = {
            "eager": model,
            "inductor": torch.compile(model, dynamic=False),
            "elision": torch.compile(model, backend=backend, dynamic=False),
        }
        with torch.inference_mode():
            for _ in range(3):  # in turns: what compiling one engine pushed out of memory is back before the clock runs
                results = {engine: call(**given)[0] for engine, call in self.engines.items()}
        last = report()["graphs"][-1]
        assert last.runs == "native" and not last.fallen, (last.reason, last.fallen)
        most = float(results["eager"].abs().max())
        self.apart = {e: float((x - results["eager"]).abs().max()) / most for e, x in results.items()}

    def row(self, rounds: int, raw: list[dict[str, Any]]) -> str:
        times: dict[str, list[float]] = {engine: [] for engine in self.engines}
        begun = time.perf_counter()
        with torch.inference_mode():
            while len(times["eager"]) < rounds and time.perf_counter() - begun < MOST:
                for engine, call in self.engines.items():
                    start = time.perf_counter()
                    call(**self.given)
                    times[engine].append(time.perf_counter() - start)
        raw.append({"call": self.name, "seconds": times})
        shown = [f"{statistics.median(t) * 1e3:.2f} ({min(t) * 1e3:.2f})" for t in times.values()]
        gain = statistics.median(times["inductor"]) / statistics.median(times["elision"])
        apart = f"{self.apart['inductor']:.0e} | {self.apart['elision']:.0e}"
        return f"| {self.name} | {' | '.join(shown)} | {gain:.2f} | {apart} | {len(times['eager'])} |"


def table(cases: list[Prepared], rounds: int, raw: list[dict[str, Any]]) -> list[str]:
    lines = [
        '# torch.compile(model, backend="elision"): one call',
        "",
        f"{platform.machine()}, torch {torch.__version__}, float32, threads: {torch.get_num_threads()}. Milliseconds, the median "
        f"(the fastest) of so many turns; Inductor by Elision, of the medians; differences from eager, of the largest value.",
        "",
        "| call | eager | Inductor | Elision | Inductor / Elision | Inductor differs | Elision differs | turns |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        lines.append(case.row(rounds, raw))
        console.print(lines[-1])
    return lines


def generation(turns: int, raw: list[dict[str, Any]], tokens: int = 33) -> list[str]:
    """A step of `generate(cache_implementation="static")` after a prompt of 64 tokens."""
    engines: dict[str, dict[str, Any]] = {"eager": {}, "inductor": {"dynamic": False}, "elision": {"backend": backend}}
    ids = torch.randint(100, 40000, (1, 64), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    texts, models = {}, {}
    for engine, how in engines.items():
        models[engine] = load_source("smollm2").model
        if how:
            models[engine].forward = torch.compile(models[engine].forward, **how)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    for turn in range(turns + 1):  # the first one compiles
        for engine, model in models.items():
            clock = Clock()
            texts[engine] = model.generate(ids, **given, cache_implementation="static", pad_token_id=0, streamer=clock)
            if turn:
                times[engine] += [b - a for a, b in zip(clock.times[2:], clock.times[3:], strict=False)]
    last = report()["graphs"][-1]
    assert last.runs == "native" and not last.fallen and torch.equal(texts["eager"], texts["elision"]), (last.reason, last.fallen)
    shown = [f"{statistics.median(t) * 1e3:.2f} ({min(t) * 1e3:.2f})" for t in times.values()]
    gain = statistics.median(times["inductor"]) / statistics.median(times["elision"])
    raw.append({"call": "SmolLM2, a step of `generate`, static cache", "seconds": times})
    return [
        "",
        "| a step of generate, static cache | eager | Inductor | Elision | Inductor / Elision |",
        "|---|---:|---:|---:|---:|",
        f"| SmolLM2, after 64 tokens, {turns} texts of {tokens} | {' | '.join(shown)} | {gain:.2f} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--raw", type=Path, help="where the samples go, a line of JSON for each call")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    torch._dynamo.config.recompile_limit = 64  # the models of transformers share one frame
    cases = [Prepared(*case) for each in (minilm, digits, smollm2) for case in each()]
    raw: list[dict[str, Any]] = []
    lines = table(cases, args.rounds, raw) + generation(3, raw)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)
    if args.raw:
        args.raw.write_text("".join(json.dumps(row) + "\n" for row in raw))


if __name__ == "__main__":
    main()
