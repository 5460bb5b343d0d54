"""`elision bench`: our engine, and transformers in turns with it, in one process."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from elision.errors import BadInput
from elision.runtime.measure import Speed, measure, most_tokens_per_second, read_bandwidth, speculation, without_speculation
from elision.runtime.model import Model


def compare(
    model: Model, source: str, against: str | None, prompt_tokens: int, new_tokens: int, runs: int, prompt: str | None = None
) -> dict[str, Any]:
    """Medians of ``runs`` runs per engine, in turns after a warm-up each: tokens/s of decoding, seconds to the first token, bytes
    of state.

    ``floor_tokens_per_second`` is what the read bandwidth measured here allows. ``peak_memory_bytes`` is the process's (a
    compilation in it included) before a peer is loaded. The peer is the model in ``source`` as it is, without passes. The prompt
    is ``prompt`` through the model's tokenizer, or random tokens, of which drafters find little to guess; a model that speculates
    is run without its drafts too, and ``speculation`` says what they did in the last run and how much faster they made it.
    """
    if prompt_tokens < 1 or runs < 1:
        raise BadInput(f"--prompt-tokens {prompt_tokens}, --runs {runs}: expected at least 1 of each")
    if "step" not in model.program.entries:
        raise BadInput(f"{source} has no decoder: there are no tokens/s to measure")
    if model.threads is not None:
        torch.set_num_threads(model.threads)  # of this process: the peer and the bandwidth are measured with as many
    ids = _ids(model, prompt, prompt_tokens)
    engines: dict[str, Callable[[], Speed]] = {"elision": lambda: measure(model, ids, new_tokens)}
    engines["elision"]()  # the warm-up
    if model.drafting is not None:
        engines["elision, without speculation"] = lambda: _plain(model, ids, new_tokens)
    peak = _peak_memory()
    if against:
        engines["transformers"] = _transformers(source, ids, new_tokens)
        engines["transformers"]()
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for _ in range(runs):
        for name, run in engines.items():
            seen[name].append(asdict(run()))
            if name == "elision":
                last = model.stats
    bandwidth = read_bandwidth()
    medians = {name: {key: statistics.median(r[key] for r in found) for key in found[0]} for name, found in seen.items()}
    drafts: dict[str, Any] = {}
    if model.drafting is not None and last is not None:
        plain = medians["elision, without speculation"]["tokens_per_second"]
        drafts = {"speculation": {**speculation(last), "speed_up": medians["elision"]["tokens_per_second"] / plain}}
    return {
        "model": model.program.name,
        "passes": list(model.program.applied),
        "prompt_tokens": ids.shape[1],
        "new_tokens": new_tokens,
        "runs": runs,
        "threads": torch.get_num_threads(),
        "engines": medians,
        "bandwidth": bandwidth,
        "floor_tokens_per_second": most_tokens_per_second(model, ids.shape[1] + new_tokens // 2, bandwidth),
        "peak_memory_bytes": peak,
        **drafts,
    }


def _ids(model: Model, prompt: str | None, count: int) -> torch.Tensor:
    """The prompt ``[1, T]``."""
    if prompt is None:
        return torch.randint(0, model.program.meta["vocab"], (1, count), generator=torch.Generator().manual_seed(0))
    if model.tokenizer is None:
        raise BadInput("--prompt needs a tokenizer, and this model came without one")
    return torch.tensor([model.tokenizer.encode(prompt)])


def _plain(model: Model, ids: torch.Tensor, new_tokens: int) -> Speed:
    with without_speculation(model):
        return measure(model, ids, new_tokens)


def _peak_memory() -> int:
    """The most bytes that were resident in this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _transformers(source: str, ids: torch.Tensor, new: int) -> Callable[[], Speed]:
    """A run of transformers' generate, timed token by token through a streamer."""
    from elision.frontend.source import load_source

    peer: Any = load_source(source).model

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run() -> Speed:
        clock, start = Clock(), time.perf_counter()
        with torch.inference_mode():
            out = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                streamer=clock,
                return_dict_in_generate=True,
            )
        first, last = clock.times[1], clock.times[-1]  # the first put is the prompt
        cache = out.past_key_values.layers
        return Speed((new - 1) / (last - first), first - start, float(sum(x.keys.nbytes + x.values.nbytes for x in cache)))

    return run
