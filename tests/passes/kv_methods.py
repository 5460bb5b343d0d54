"""Every method on caches at a tiny model, for the tests of what they compose with."""

from __future__ import annotations

import functools
from typing import Any

import torch

import elision
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.runtime.speculation import drafting_of
from tests.passes.small import tiny

PROMPT, NEW = 50, 60
#: Of every method a setting that leaves out much, and one that leaves out nothing (none for one that rounds).
METHODS = {
    "streaming-llm": ("streaming-llm:window=21,sinks=3", "streaming-llm:window=160"),
    "h2o": ("h2o:budget=24,recent=8,sinks=1", "h2o:budget=160"),
    "a2sf": ("a2sf:budget=24,recent=8,sinks=1,alpha=0.9", "a2sf:budget=160,alpha=0.9"),
    "keyformer": ("keyformer:budget=24,recent=8,sinks=1,steps=40", "keyformer:budget=160"),
    "ems": ("ems:budget=24,window=8,theta=0.3", "ems:budget=160"),
    "snapkv": ("snapkv:budget=24,window=8", "snapkv:budget=160"),
    "kv-quant": ("kv-quant", ""),
    "kivi": ("kivi:bits=2,group=16,residual=16", "kivi:group=16,residual=160"),
    "gear": ("gear:bits=2,block=16,rank=1", "gear:block=16,residual=160"),
    "quest": ("quest:budget=48,dense=1", "quest:budget=160,dense=0"),
    "duo-attention": ("duo-attention:heads=0+4,sinks=2,window=12", "duo-attention:heads=0+4,window=160"),
    "tidal-decode": ("tidal-decode:budget=12,layers=0", "tidal-decode:budget=160,layers=0"),
}


@functools.cache
def original() -> Any:
    return tiny(num_hidden_layers=3, initializer_range=0.12)


@functools.cache
def compiled(*passes: str, target: str = "reference") -> elision.Model:
    return elision.compile(original(), passes=[p for p in passes if p], target=target)


def prompts(rows: int = 2) -> torch.Tensor:
    return torch.randint(1, 9, (rows, PROMPT), generator=torch.Generator().manual_seed(1))


def tokens(model: elision.Model, new: int = NEW) -> torch.Tensor:
    found = model.generate(prompts(), max_new_tokens=new)
    assert isinstance(found, torch.Tensor)
    return found


def drafted(model: elision.Model, new: int = NEW) -> torch.Tensor:
    """Tokens with 12 nodes drafted in every round."""
    fresh = drafting_of(model._interpreter, "")
    assert fresh is not None
    model.drafting = Drafting(list(fresh.drafters), Always(12))
    return tokens(model, new)
