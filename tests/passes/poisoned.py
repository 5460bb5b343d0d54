"""A run on caches that are filled with a number: nothing may depend on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import elision
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.ir.requests import Requests
from elision.ir.states import KV
from elision.ir.store import KVStore
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.runtime.session import Session
from elision.runtime.speculation import drafting_of

PROMPTS = ([3, 1, 4, 1, 5], [2, 7, 2, 7, 2, 7, 2, 7, 2, 7, 2])
NEW, ROOM = 40, 80


@dataclass
class Seen(Requests):
    """Keeps the logits of every round."""

    logits: list[torch.Tensor] = field(default_factory=list)

    def verify(self, ids: torch.Tensor, logits: torch.Tensor, *rest: Any, at: Any = None) -> Any:
        self.logits.append(logits.clone())
        return super().verify(ids, logits, *rest, **({} if at is None else {"at": at}))


def rounds(model: elision.Model, poison: float) -> list[torch.Tensor]:
    """The logits after two prompts and of all rounds of 40 tokens, with up to 12 drafted nodes where there are drafters. Every
    cache starts filled with ``poison``; what attention reads is checked to have been written."""
    interpreter = model._interpreter
    fresh = drafting_of(interpreter, "")
    drafts = None if not isinstance(fresh, Drafting) else Drafting(fresh.drafters, Always(12)).run(2)
    session = Session(interpreter, 2, ROOM, drafts)
    for name, type in model.program.states.items():
        if isinstance(type, KV):
            session._stores[name] = KVStore(type, 2, ROOM, torch.float32, poison)
    logits = session.prefill([list(p) for p in PROMPTS])
    found, said = [logits], [[*p, int(x.argmax())] for p, x in zip(PROMPTS, logits, strict=True)]
    while min(map(len, said)) < NEW:
        items, histories = [Request(Warp(), True, 0, r) for r in range(2)], [torch.tensor(s) for s in said]
        requests = Seen(items, histories, [len(p) for p in PROMPTS])
        produced = session.round({r: s[-1] for r, s in enumerate(said)}, requests)
        said = [s + new for s, new in zip(said, produced, strict=True)]
        found += requests.logits
    return [*found, torch.tensor([s[:NEW] for s in said])]
