"""`elision bench`: our engine, and transformers in turns with it, in one process."""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.cost import cost, floor, total
from elision.ir.op import Sizes
from elision.runtime.model import Model


def measure(model: Model, source: str, against: str | None, prompt_tokens: int, new_tokens: int, runs: int) -> dict[str, Any]:
    """Medians of ``runs`` runs per engine, in turns after a warm-up each: tokens/s of decoding, seconds to the first
    token, bytes of state.

    ``floor_tokens_per_second``: by the bytes of weights and states that a token must read, over the read bandwidth measured here.
    """
    if against not in (None, "transformers"):
        raise BadInput(f"--against {against}: expected transformers")
    if min(prompt_tokens, runs) < 1 or new_tokens < 2:
        raise BadInput("expected at least 1 prompt token, 2 new tokens and 1 run")
    vocab = model.program.meta["vocab"]
    ids = torch.randint(0, vocab, (1, prompt_tokens), generator=torch.Generator().manual_seed(0))
    engines: dict[str, Any] = {"elision": lambda: _ours(model, ids, new_tokens)}
    if against:
        engines["transformers"] = _theirs(source, ids, new_tokens)
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for turn in range(runs + 1):
        for name, run in engines.items():
            found = run()
            if turn:  # the first is the warm-up
                seen[name].append(found)
    bandwidth = read_bandwidth()
    row = total(cost(model.program, "step", Sizes(tokens=1, rows=1, context=prompt_tokens + new_tokens // 2)))
    return {
        "model": model.program.name,
        "passes": list(model.program.applied),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "runs": runs,
        "threads": torch.get_num_threads(),
        "engines": {name: {key: statistics.median(r[key] for r in found) for key in found[0]} for name, found in seen.items()},
        "bandwidth": bandwidth,
        "floor_tokens_per_second": 1 / floor(row, bandwidth, float("inf")),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def read_bandwidth() -> float:
    """Bytes a second of summing an array much larger than the caches: the best of five."""
    array = torch.ones(64 * 1024 * 1024)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - start)
    return array.numel() * 4 / best


def _ours(model: Model, ids: torch.Tensor, new: int) -> dict[str, float]:
    model.generate(ids, max_new_tokens=new, eos_token_id=[], temperature=0)
    assert model.stats is not None
    return {
        "tokens_per_second": model.stats.tokens_per_second,
        "first_token": model.stats.time_to_first_token,
        "state_bytes": float(model.stats.state_bytes),
    }


def _theirs(source: str, ids: torch.Tensor, new: int) -> Any:
    """A run of transformers' eager generate, timed token by token through a streamer."""
    from elision.frontend.source import load_source

    peer: Any = load_source(source).model

    class Clock:
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run() -> dict[str, float]:
        clock, start = Clock(), time.perf_counter()
        with torch.inference_mode():
            out = peer.generate(
                ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=clock, return_dict_in_generate=True
            )
        tokens = clock.times[1:]  # the first put is the prompt
        cache = out.past_key_values
        bytes_ = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        return {
            "tokens_per_second": (len(tokens) - 1) / (tokens[-1] - tokens[0]),
            "first_token": tokens[0] - start,
            "state_bytes": float(bytes_),
        }

    return run
