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


def weight_bytes(tensors: Any) -> int:
    """Bytes of distinct weights: a tied embedding and head count once."""
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("--skip", default="skip-layers:layers=5+17-18", help="the pass to compare with (default: %(default)s)")
    parser.add_argument("--prompt", default="What is the capital of France, and what is it known for?")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of every timed run (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="timed runs of each engine, in turns (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=90, help="start no more runs after this long (default: %(default)s)")
    args = parser.parse_args()

    log = logging.getLogger("elision")
    log.setLevel(logging.INFO)
    log.addHandler(Stages())
    transformers.utils.logging.set_verbosity_error()

    console.print(f"[bold]Compiling {args.model}[/]")
    model = elision.compile(args.model)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    console.print(f"[bold]Loading {args.model} into transformers[/]")
    peer = load_source(args.model).model
    assert isinstance(peer, PreTrainedModel)
    console.print(f"[bold]Compiling it with {args.skip}[/]")
    skipped = elision.compile(peer, passes=[args.skip])

    prompt = tokenizer.chat(args.prompt) if tokenizer.chat_template else args.prompt
    ids = torch.tensor([tokenizer.encode(prompt, add_special=tokenizer.chat_template is None)])
    console.print(f"\n[bold]{args.prompt}[/]")
    model.generate(
        ids, max_new_tokens=args.tokens, temperature=0, streamer=lambda row, ids, text: print(text, end="", flush=True)
    )
    print("\n")

    engines = [Measured("transformers"), Measured("elision"), Measured(f"elision + {args.skip.partition(':')[0]}")]
    with console.status("measuring, in turns"):
        run_transformers(peer, ids, 2, Measured("warm-up"))
        run_elision(skipped, ids, 2, Measured("warm-up"))
        begun = time.perf_counter()
        while len(engines[0].speed) < args.runs and time.perf_counter() - begun < args.seconds:
            run_transformers(peer, ids, args.tokens, engines[0])
            run_elision(model, ids, args.tokens, engines[1])
            run_elision(skipped, ids, args.tokens, engines[2])

    base, full, less = engines
    weights = [weight_bytes(peer.parameters()), weight_bytes(model.weights.values()), weight_bytes(skipped.weights.values())]
    layers = [getattr(peer.config, "num_hidden_layers", 0), len(model.program.layers), len(skipped.program.layers)]
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
    table.add_row("operators raised", "", *(coverage(m) for m in (model, skipped)))
    table.add_row("quality", "", model.program.quality, skipped.program.quality)
    table.add_row("tokens as transformers", "", *(agreement(base.tokens, e.tokens) for e in engines[1:]))
    console.print(table)
    console.print(
        f"{args.skip} leaves out {layers[1] - layers[2]} of {layers[1]} layers: {(weights[1] - weights[2]) / 1e6:.1f} MB of "
        f"weights, {(full.state - less.state) / 1e3:.0f} kB of state, and "
        f"{1 - max(full.speed) / max(less.speed):.0%} of the time of a token."
    )


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
