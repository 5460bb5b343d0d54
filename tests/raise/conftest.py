"""Tiny models of several families, captured once for all the tests of this area."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import fx, nn

from elision.frontend.attention import ATTENTION
from elision.frontend.capture import Captured, capture
from elision.frontend.normalise import normalise
from elision.frontend.structure import Structure, find_structure
from elision.frontend.taint import Taint


@dataclass(frozen=True, eq=False)
class Sample:
    model: nn.Module
    raw: Captured
    captured: Captured
    taint: Taint
    structure: Structure

    @property
    def attention(self) -> list[fx.Node]:
        return [n for n in self.captured.graph.nodes if n.target is ATTENTION]

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.captured.graph.nodes if str(n.target) == name)


def sample(model: nn.Module) -> Sample:
    raw = capture(model)
    captured = replace(raw, graph=normalise(raw.graph))
    taint = Taint(captured.graph, captured.kinds)
    return Sample(model, raw, captured, taint, find_structure(captured.graph, taint))


@pytest.fixture(scope="session")
def of() -> Callable[..., Sample]:
    """``of(family, **changes)``: the captured tiny model, from a cache."""
    cache: dict[str, Sample] = {}

    def get(family: str, **changes: Any) -> Sample:
        key = f"{family} {sorted(changes.items())}"
        if key not in cache:
            cache[key] = sample(tiny(family, **changes))
        return cache[key]

    return get


@pytest.fixture
def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions ``[3, 17]``: another batch and length than the ones traced."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 128, (3, 17), generator=generator), torch.arange(17).expand(3, 17).contiguous()
