"""Attention masks: which positions a query may see. A mask is a function of positions, never of array
indices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.errors import BadInput

KINDS = ("causal", "full", "window", "chunk")


@dataclass(frozen=True)
class Mask:
    """Query position i sees key position j when: ``causal`` j <= i; ``full`` always; ``window(w)`` j <= i and
    i - j < w; ``chunk(c)`` j <= i and j // c == i // c. A window also shows the first ``sinks`` positions. Printed
    as ``causal``, ``full``, ``window(8)``, ``window(8, 4)``, ``chunk(8)``.
    """

    kind: str = "causal"
    size: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        sized = self.kind in ("window", "chunk")
        if self.kind not in KINDS or (self.size < 1 if sized else self.size != 0):
            expected = "causal, full, window(size) or chunk(size) with size >= 1"
            raise BadInput(f"unknown mask {self.kind!r} of size {self.size}; expected {expected}")
        if self.sinks < 0 or (self.sinks and self.kind != "window"):
            raise BadInput(f"a mask {self.kind!r} with {self.sinks} sinks; expected sinks >= 0, and only of a window")

    def __str__(self) -> str:
        sinks = f", {self.sinks}" if self.sinks else ""
        return f"{self.kind}({self.size}{sinks})" if self.size else self.kind

    def visible(self, q_pos: torch.Tensor, k_pos: torch.Tensor) -> torch.Tensor:
        """Whether each key is visible to each query; positions are integers and broadcast together."""
        if self.kind == "full":
            return torch.ones_like(q_pos, dtype=torch.bool) & torch.ones_like(k_pos, dtype=torch.bool)
        seen = k_pos <= q_pos
        if self.kind == "window":
            seen &= (q_pos - k_pos < self.size) | (k_pos < self.sinks)
        elif self.kind == "chunk":
            seen &= q_pos // self.size == k_pos // self.size
        return seen
