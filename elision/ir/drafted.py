"""Drafts whose tokens were drawn: what the sampled verification rules have to know of them.

A drafter's own noise must be a stream of its own, and keyed on the *root's* position and the node: a position can be drafted in
several rounds, and what a round accepted depends on what was drawn for it then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elision.errors import BadInput
from elision.ir.noise import RowKey, gumbel_rows, uniform_rows

#: How children were chosen: by the past alone; each drawn from q; each drawn from q without those before it.
KINDS = ("point", "iid", "wor")

#: Noise streams: the token after the accepted path (the same for every rule, so that all agree where nothing is drafted), the
#: acceptance of children, that of a block, and the order in which equal draws are tested.
VERIFY, ACCEPT, BLOCK, ORDER = "verify", "accept", "block", "order"


@dataclass(frozen=True)
class Drafted:
    """From which distributions the children of each node were drawn.

    ``q [..., n, V]``: line i is what the children of node i were drawn from, after the drafter's own warping (of "wor", the first
    child); None for "point". ``draws [..., n]`` (int64, "iid" only): how often each node was drawn, where equal siblings were
    merged into one node; without it every node was drawn once. Raises BadInput if these do not fit together.
    """

    kind: str
    q: torch.Tensor | None = None
    draws: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInput(f"drafts of kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        if (self.q is None) != (self.kind == "point"):
            given = "without" if self.q is None else "with"
            raise BadInput(f"drafts of kind {self.kind} {given} q; q is given unless the kind is point")
        if self.draws is not None and self.kind != "iid":
            raise BadInput(f"draws of kind {self.kind}; only iid siblings can be drawn more than once")

    def part(self, which: slice | None) -> Drafted:
        """Of some nodes of a leading axis; None gives all a leading axis of 1."""
        return Drafted(self.kind, *(None if x is None else x[which] for x in (self.q, self.draws)))


@dataclass(frozen=True)
class Trees:
    """m trees of n nodes each, verified together. Row r is the tree of one sequence.

    ``tokens [m, n]`` and ``parent [m, n]`` (within the tree, -1 for the root, node 0); ``p(rows, nodes)``: the target's warped
    distributions ``float64 [len(rows), V]`` at these nodes; ``keys`` and ``positions`` (of the roots): whose noise, and where.
    """

    tokens: torch.Tensor
    parent: torch.Tensor
    drafted: Drafted
    p: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    keys: Sequence[RowKey]
    positions: Sequence[int]

    def q(self, rows: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor | None:
        """The normalised ``float64 [len(rows), V]`` that the children of these nodes were drawn from; None for "point"."""
        return None if self.drafted.q is None else norm(self.drafted.q[rows, nodes].double())

    def children(self, rows: torch.Tensor, nodes: torch.Tensor, depth: int) -> torch.Tensor:
        """The children of these nodes (at this depth) in the order drawn, ``[len(rows), most]``, -1 behind the last."""
        drawn = self.parent[rows] == nodes[:, None]
        if self.drafted.draws is None:
            count = drawn.sum(1)
            order = torch.argsort((~drawn).int(), dim=1, stable=True)
        else:  # the order of merged draws is lost; draws that are i.i.d. may be tested in any random order
            times = self.drafted.draws[rows] * drawn
            count, most = times.sum(1), max(1, int(times.max()))
            slots = (torch.arange(most) < times[:, :, None]).flatten(1)
            noise = self.noise(rows, depth + 1, ORDER, slots.shape[1])
            order = torch.where(slots, noise, 2.0).argsort(1) // most
        order = order[:, : int(count.max())]
        return torch.where(torch.arange(order.shape[1]) < count[:, None], order, -1)

    def noise(self, rows: torch.Tensor, ahead: int, stream: str, n: int) -> torch.Tensor:
        """Uniform numbers ``[len(rows), n]`` of a stream at the position ``ahead`` of the root."""
        return uniform_rows(*self._where(rows, ahead), stream, n)

    def draw(self, rows: torch.Tensor, ahead: int, p: torch.Tensor) -> torch.Tensor:
        """Tokens ``[len(rows)]`` drawn from ``p [len(rows), V]`` (of any sum), for the position ``ahead`` of the root."""
        return (p.log() + gumbel_rows(*self._where(rows, ahead), VERIFY, p.shape[1])).argmax(1)

    def _where(self, rows: torch.Tensor, ahead: int) -> tuple[list[RowKey], list[int]]:
        chosen = rows.tolist()
        return [self.keys[r] for r in chosen], [self.positions[r] + ahead for r in chosen]


def norm(x: torch.Tensor) -> torch.Tensor:
    """``x / sum(x)`` along the last axis."""
    return x / x.sum(-1, keepdim=True)
