"""Every test of torch.compile begins anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from elision.backend import elision as backend


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend.reset()  # type: ignore[attr-defined]  # torch resets only what was compiled since its last reset
