"""The run-time inputs of a round: for every sequence its sampling request and its tokens so far."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from elision.ir import verify as rules
from elision.ir.drafted import Drafted
from elision.ir.tokens import Tokens
from elision.ir.warp import warp


@dataclass
class Requests:
    """``items[r]``: the request of sequence r; ``histories[r]``: its committed tokens, int64, the root of its tree last.

    For drafters: ``prompts[r]``, how many of these tokens were given; ``room[r]``, the most levels its next tree may have.
    ``depth[r]``: the number of the step that its prompt chose (`routed`).
    """

    items: list[rules.Request]
    histories: list[torch.Tensor]
    prompts: list[int] = field(default_factory=list)
    room: list[int] = field(default_factory=list)
    depth: list[int] = field(default_factory=list)

    def first(self, logits: torch.Tensor) -> list[int]:
        """The first token of every sequence after its prompt, from ``logits [rows, V]``."""
        return [
            rules.draw(row, history, item)
            for item, history, row in zip(self.items, self.histories, logits, strict=True)
        ]

    def verify(
        self, ids: torch.Tensor, logits: torch.Tensor, best: torch.Tensor, at: Tokens, drafted: Drafted | None = None,
        rule: str | None = None,
    ) -> tuple[list[list[int]], torch.Tensor]:  # fmt: skip
        """For each sequence the accepted nodes (empty if it is not in the call), and the next token of each that is.
        ``best [n, k]``: the likeliest tokens of each node; ``drafted``: of all nodes, what sampled drafts were drawn from;
        ``rule``: of all sampled rows, in the place of their requests' own."""
        assert at.parent is not None
        paths: list[list[int]] = [[] for _ in self.items]
        drawn: list[int] = []
        rows, parents = at.row.tolist(), at.parent.numpy()
        stop = 0
        while stop < len(rows):  # the tokens of a row are side by side: views, no copies of logits
            start, r = stop, rows[stop]
            stop = bisect_right(rows, r)
            own, item = slice(start, stop), self.items[r]
            if item.plain:
                paths[r], token = follow(ids[own].numpy(), parents[own], best[own, 0].numpy())
            else:
                paths[r], token = rules.verify(
                    ids[own],
                    parents[own].tolist(),
                    int(at.pos[start]),
                    logits[own],
                    self.histories[r],
                    item if rule is None else replace(item, rule=rule),
                    None if drafted is None else drafted.part(own),
                )
            drawn.append(token)
        return paths, torch.tensor(drawn, dtype=torch.int64)

    def warp(self, logits: torch.Tensor, at: Tokens, ids: torch.Tensor) -> torch.Tensor:
        """Probabilities ``[n, V]`` of every node by its row's request, penalties along the node's own ancestors."""
        out = torch.empty(logits.shape, dtype=torch.float32)
        for i, r in enumerate(at.row.tolist()):
            history = torch.cat((self.histories[r], self._ancestors(i, at, ids)))
            out[i] = warp(logits[i : i + 1], [history], self.items[r].warp)[0]
        return out

    @staticmethod
    def _ancestors(node: int, at: Tokens, ids: torch.Tensor) -> torch.Tensor:
        """Drafted tokens on the way from the root (exclusive: it is in the history) to a node."""
        assert at.parent is not None
        mine = at.of_row(int(at.row[node]))
        place = int((mine == node).nonzero())
        found: list[int] = []
        while place > 0:
            found.append(int(ids[mine[place]]))
            place = int(at.parent[mine[place]])
        return ids.new_tensor(found[::-1])


def follow(ids: np.ndarray, parent: np.ndarray, best: np.ndarray) -> tuple[list[int], int]:
    """Rule V1 where the likeliest token after each node is known: from the root on to the child that holds it."""
    path, token = [0], int(best[0])
    while len(path) < len(ids):
        children = ((parent == path[-1]) & (ids == token)).nonzero()[0]
        if not len(children):
            break
        path.append(int(children[0]))
        token = int(best[path[-1]])
    return path, token
