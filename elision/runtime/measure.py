"""How fast a compiled model runs on this machine, and how fast it could run at most."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.cost import cost, floor, total
from elision.ir.op import Sizes
from elision.runtime.generate import Stats
from elision.runtime.model import Model


@dataclass(frozen=True)
class Speed:
    """One run of one sequence: decoded tokens per second after the first, seconds to the first, bytes allocated for states."""

    tokens_per_second: float
    first_token: float
    state_bytes: float


def measure(model: Model, ids: torch.Tensor, new_tokens: int) -> Speed:
    """Generate exactly ``new_tokens`` (at least 2) greedily after the prompt ``ids [1, T]``. Raises BadInput if the model has no
    room for them."""
    needed = ids.shape[1] + new_tokens
    if new_tokens < 2 or needed > model.max_context:
        raise BadInput(
            f"{ids.shape[1]} prompt tokens and {new_tokens} new ones cannot be measured: expected at least 2 new tokens, and "
            f"at most {model.max_context} together (max_context)"
        )
    model.generate(ids, max_new_tokens=new_tokens, eos_token_id=[], temperature=0)
    stats = model.stats
    assert stats is not None
    return Speed(stats.tokens_per_second, stats.time_to_first_token, float(stats.state_bytes))


@contextmanager
def without_speculation(model: Model) -> Iterator[None]:
    """The model drafts nothing, as if it had been compiled without drafters (for measuring; other calls see it, too)."""
    before = model.drafting
    model.drafting = before.resting() if before is not None else None
    try:
        yield
    finally:
        model.drafting = before


def speculation(stats: Stats) -> dict[str, Any]:
    """What speculation did in a call, in plain data: rounds, drafts, those accepted (also by drafter), seconds by part."""
    return {
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "tokens_per_round": stats.tokens_per_round,
        "draft_time": stats.draft_time,
        "verify_time": stats.verify_time,
        "commit_time": stats.commit_time,
        "drafters": {
            name: {"drafted": c.drafted, "accepted": c.accepted, "accepted_per_round": c.accepted / max(c.rounds, 1)}
            for name, c in stats.drafters.items()
        },
    }


def most_tokens_per_second(model: Model, context: int, bandwidth: float) -> float:
    """The bound that memory sets on decoding one sequence with ``context`` entries: ``bandwidth`` (bytes/s) over the bytes of
    weights and states that a token must read (`elision.ir.cost.floor`)."""
    row = total(cost(model.program, "step", Sizes(tokens=1, rows=1, context=context)))
    return 1 / floor(row, bandwidth, float("inf"))


def read_bandwidth() -> float:
    """Bytes a second of summing an array much larger than the caches: the best of five."""
    array = torch.ones(64 * 1024 * 1024)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        best = min(best, time.perf_counter() - start)
    return array.nbytes / best
