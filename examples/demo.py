"""Compile SmolLM2-135M-Instruct, answer a question, and compare with transformers: `make demo`, or `python examples/demo.py`."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import elision
from elision.frontend.source import load_source

console = Console(highlight=False)

#: What is compared with plain Elision: the file's own weights with rounded activations, and three layers less.
DEFAULT = ("stored a8", "skip-layers:layers=5+17-18")


class Stages(logging.Handler):
    """Shows what the compiler logs, with the seconds since the start."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.start = time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        console.print(f"  [dim]{time.perf_counter() - self.start:5.1f} s[/]  {record.getMessage()}", soft_wrap=True)


@dataclass
class Measured:
    """What the runs of one engine showed: tokens per second and seconds to the first token (one per run), the new
    tokens, and the bytes of its cache after the last run."""

    name: str
    speed: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    state: int = 0


def run_elision(model: elision.Model, ids: torch.Tensor, n: int, seen: Measured) -> None:
    """Generate exactly ``n`` tokens, greedily."""
    out = model.generate(ids, max_new_tokens=n, min_new_tokens=n, temperature=0)
    assert model.stats is not None
    seen.speed.append(model.stats.tokens_per_second)
    seen.first.append(model.stats.time_to_first_token)
    seen.tokens, seen.state = out[0, ids.shape[1] :].tolist(), model.stats.state_bytes


class Clock:
    """A streamer of transformers that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def run_transformers(model: PreTrainedModel, ids: torch.Tensor, n: int, seen: Measured) -> None:
    """The same as `run_elision` with `transformers.generate`, by the same definitions of the figures."""
    clock, start = Clock(), time.perf_counter()
    out: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, streamer=clock,
        return_dict_in_generate=True,
    )  # fmt: skip
    first, last = clock.times[1], clock.times[-1]  # the streamer is given the prompt before
    seen.speed.append((n - 1) / (last - first))
    seen.first.append(first - start)
    seen.tokens = out.sequences[0, ids.shape[1] :].tolist()
    seen.state = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("-p", "--passes", action="append", help="passes to compare with, separated by spaces; may be repeated")
    parser.add_argument("--prompt", default="What is the capital of France, and what is it known for?")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every timed run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each engine, in turns (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=90, help="start no more runs after this long (default: %(default)s)")
    args = parser.parse_args()
    variants = [text.split() for text in args.passes or DEFAULT]

    log = logging.getLogger("elision")
    log.setLevel(logging.INFO)
    log.addHandler(Stages())
    transformers.utils.logging.set_verbosity_error()

    console.print(f"[bold]Loading {args.model} into transformers[/]")
    peer = load_source(args.model).model
    assert isinstance(peer, PreTrainedModel)
    models = []
    for passes in ([], *variants):
        console.print(f"[bold]Compiling {args.model}{' with ' if passes else ''}{' '.join(passes)}[/]")
        models.append(elision.compile(args.model, passes=passes))
    model = models[0]
    tokenizer = model.tokenizer
    assert tokenizer is not None

    prompt = tokenizer.chat(args.prompt) if tokenizer.chat_template else args.prompt
    ids = torch.tensor([tokenizer.encode(prompt, add_special=tokenizer.chat_template is None)])
    console.print(f"\n[bold]{args.prompt}[/]")
    model.generate(
        ids, max_new_tokens=args.tokens, temperature=0, streamer=lambda row, ids, text: print(text, end="", flush=True)
    )
    print("\n")

    base, ours = Measured("transformers"), [Measured("\n".join(["elision", *passes])) for passes in ([], *variants)]
    with console.status("measuring, in turns"):
        run_transformers(peer, ids, 2, Measured("warm-up"))
        for m in models:
            run_elision(m, ids, 2, Measured("warm-up"))
        begun = time.perf_counter()
        while len(base.speed) < args.runs and time.perf_counter() - begun < args.seconds:
            run_transformers(peer, ids, args.tokens, base)
            for m, seen in zip(models, ours, strict=True):
                run_elision(m, ids, args.tokens, seen)

    engines = [base, *ours]
    weights = [sum({p.data_ptr(): p.nbytes for p in peer.parameters()}.values()), *(m.report["weight_bytes"] for m in models)]
    layers = [getattr(peer.config, "num_hidden_layers", 0), *(len(m.program.layers) for m in models)]
    table = Table(
        title=f"{ids.shape[1]} prompt tokens, {args.tokens} new, batch 1, {model.program.meta['dtype']}, "
        f"{torch.get_num_threads()} threads, best of {len(base.speed)}"
    )
    table.add_column()
    for engine in engines:
        table.add_column(engine.name, justify="right")
    table.add_row("tokens/s", *(f"{max(e.speed):.1f}" for e in engines))
    table.add_row("time to first token", *(f"{min(e.first) * 1e3:.0f} ms" for e in engines))
    table.add_row("layers", *map(str, layers))
    table.add_row("weights", *(f"{size / 1e6:.1f} MB" for size in weights))
    table.add_row("state", *(f"{e.state / 1e6:.2f} MB" for e in engines))
    table.add_row("operators raised", "", *(coverage(m) for m in models))
    table.add_row("quality", "", *(m.program.quality for m in models))
    table.add_row("tokens as transformers", "", *(agreement(base.tokens, e.tokens) for e in ours))
    console.print(table)


def coverage(model: elision.Model) -> str:
    """How much of the model the compiler understands; the rest would run as opaque torch operators."""
    raised, opaque = (sum(model.coverage[kind].values()) for kind in ("sites", "opaque"))
    return f"{raised - opaque} of {raised}"


def agreement(expected: list[int], got: list[int]) -> str:
    """Up to where two continuations are the same."""
    same = next((i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a != b), len(expected))
    return "all" if same == len(expected) else f"the first {same}"


if __name__ == "__main__":
    main()
