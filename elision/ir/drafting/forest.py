"""Trees of several rows that grow together, a level at a time."""

from __future__ import annotations

import torch

from elision.ir.tokens import Tokens
from elision.ir.tree import signed

#: A node: the place of its tree in the call, and its index in the tree.
Node = tuple[int, int]


class Forest:
    """One tree for each token of ``at`` (its rows, its roots' positions), first the roots alone, which hold ``last``."""

    def __init__(self, last: torch.Tensor, at: Tokens) -> None:
        self.rows, self.roots, self._sequences = at.row.tolist(), at.pos.tolist(), at.rows
        self.token = [[int(t)] for t in last.tolist()]
        self.parent: list[list[int]] = [[-1] for _ in self.rows]
        self.depth = [[0] for _ in self.rows]
        self._bits = [[1] for _ in self.rows]

    def size(self, place: int) -> int:
        return len(self.token[place])

    def add(self, parent: Node, token: int) -> Node:
        """A new leaf."""
        place, above = parent
        node = len(self.token[place])
        self.token[place].append(token)
        self.parent[place].append(above)
        self.depth[place].append(self.depth[place][above] + 1)
        self._bits[place].append(self._bits[place][above] | 1 << node)
        return place, node

    def path(self, node: Node) -> list[int]:
        """The tokens from below the root to a node."""
        place, i = node
        found: list[int] = []
        while i > 0:
            found.append(self.token[place][i])
            i = self.parent[place][i]
        return found[::-1]

    def some(self, nodes: list[Node], hide_root: bool = False) -> tuple[torch.Tensor, Tokens]:
        """Ids and tokens of these nodes (in order of place, then index). ``hide_root``: their roots are no nodes but committed
        already."""
        hidden = ~1 if hide_root else -1
        row = [self.rows[p] for p, _ in nodes]
        pos = [self.roots[p] + self.depth[p][i] for p, i in nodes]
        parent = [self.parent[p][i] for p, i in nodes]
        anc = [signed(self._bits[p][i] & hidden & (1 << 64) - 1) for p, i in nodes]
        ids = torch.tensor([self.token[p][i] for p, i in nodes])
        parts = [torch.tensor(x) for x in (row, pos, parent, anc)]
        return ids, Tokens(parts[0], parts[1], self._sequences, parts[2], parts[3])

    def whole(self) -> tuple[torch.Tensor, Tokens]:
        """Ids and tokens of all nodes."""
        return self.some([(p, i) for p, tokens in enumerate(self.token) for i in range(len(tokens))])

    def offsets(self) -> list[int]:
        """Where each tree begins among all nodes."""
        found = [0]
        for tokens in self.token:
            found.append(found[-1] + len(tokens))
        return found
