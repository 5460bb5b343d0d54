"""Token trees: what a round drafts for one row. Slot 0 is the root, the last committed token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elision.errors import BadInput
from elision.ir.tokens import Tokens

MAX_NODES = 64  # one word of ancestor bits


@dataclass(frozen=True)
class Tree:
    """``parent[i] < i`` is the node before node i; ``parent[0] = -1``, the only root."""

    parent: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parent) <= MAX_NODES:
            raise BadInput(f"a token tree of {len(self.parent)} nodes; expected 1 to {MAX_NODES}")
        if self.parent[0] != -1 or any(not 0 <= p < i for i, p in enumerate(self.parent) if i):
            raise BadInput(f"tree parents {self.parent}; expected -1 first, then each node after its parent")

    @property
    def depth(self) -> list[int]:
        """Edges from the root to each node."""
        depth = [0] * len(self.parent)
        for i, p in enumerate(self.parent[1:], 1):
            depth[i] = depth[p] + 1
        return depth

    @property
    def ancestors(self) -> list[int]:
        """Per node the bitset of its ancestors and itself: bit j for node j."""
        bits = [1] * len(self.parent)
        for i, p in enumerate(self.parent[1:], 1):
            bits[i] = bits[p] | (1 << i)
        return bits

    @property
    def is_chain(self) -> bool:
        return all(p == i - 1 for i, p in enumerate(self.parent))

    def path(self, node: int) -> list[int]:
        """The nodes from the root to ``node``."""
        found = [node]
        while self.parent[found[-1]] >= 0:
            found.append(self.parent[found[-1]])
        return found[::-1]


def signed(bits: int) -> int:
    """A 64-bit word as the int64 that torch stores."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits


def pack(
    trees: Sequence[Tree], positions: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One tree per row, roots at ``positions``, concatenated: ``(row, pos, parent, anc)``, int64 ``[N]``.

    ``row`` is the index of the tree; ``parent`` counts within it; bit j of ``anc`` is node j of it.
    """
    row = torch.cat([torch.full((len(t.parent),), r) for r, t in enumerate(trees)])
    pos = torch.tensor([p + d for t, p in zip(trees, positions, strict=True) for d in t.depth])
    parent = torch.tensor([p for t in trees for p in t.parent])
    anc = torch.tensor([signed(b) for t in trees for b in t.ancestors])
    return row, pos, parent, anc


def roots(at: Tokens) -> Tokens:
    """Trees of their roots alone, one for each token of ``at``."""
    return Tokens(at.row, at.pos, at.rows, torch.full_like(at.row, -1), torch.ones_like(at.row))
