"""The run-time inputs of a round: for every sequence its sampling request and its tokens so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.ir import verify as rules
from elision.ir.tokens import Tokens


@dataclass
class Requests:
    """``items[r]``: the request of sequence r; ``histories[r]``: its committed tokens, int64, the root of its tree last."""

    items: list[rules.Request]
    histories: list[torch.Tensor]

    def verify(self, ids: torch.Tensor, logits: torch.Tensor, at: Tokens) -> tuple[list[list[int]], torch.Tensor]:
        """For each sequence the accepted nodes (empty if it is not in the call), and the next token of each that is."""
        raise NotImplementedError

    def warp(self, logits: torch.Tensor, at: Tokens) -> torch.Tensor:
        raise NotImplementedError
