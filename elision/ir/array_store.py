"""Run-time storage of an `Array` state: one array per row, with what it takes to undo a draft."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elision.errors import BadInput, IllegalProgram
from elision.ir.layout import allocate, array_spec
from elision.ir.nodes import nodes_of
from elision.ir.states import Array, Journal, Snapshot
from elision.ir.tokens import Tokens


class ArrayStore:
    """A state of ``type`` over ``rows`` sequences, filled with ``type.init``."""

    def __init__(self, type: Array, rows: int) -> None:
        self.type, self.rows = type, rows
        self.arrays = allocate(array_spec(type, rows))
        self.value = self.arrays["value"].fill_(type.init)
        self.checkpoint()

    def read(self) -> torch.Tensor:
        """The value ``[B, *shape]``: the committed one, or with Snapshot the one last written."""
        return self.value

    def write(self, tokens: Tokens, values: torch.Tensor) -> None:
        """Replace the value by ``values [n, *shape]``. Committed tokens: the last of each row counts. Drafted
        tokens: with Journal, kept for each node until `commit`; with Snapshot, the last of each row counts;
        without undo, IllegalProgram (rule retract)."""
        values = values.to(self.value.dtype)
        if not tokens.drafted:
            self._overwrite(tokens, values)
        elif isinstance(self.type.undo, Journal):
            node = nodes_of(tokens)
            if len(tokens) and int(node.max()) >= self.type.undo.depth:
                raise BadInput(
                    f"drafted node {int(node.max())}, but {self.type.undo} keeps nodes below its depth"
                )
            self.arrays["pending"][tokens.row, node] = values
            self.arrays["live"][tokens.row, node] = True
        elif isinstance(self.type.undo, Snapshot):
            self._overwrite(tokens, values)
            seen = torch.bincount(tokens.row, minlength=self.rows)
            self.arrays["drafted"] += seen
        else:
            raise IllegalProgram(
                "retract",
                "a state without undo was written at drafted tokens",
                sides="a write inside a round, of an Array with undo=None",
                because="a rejected token could not be taken back",
                help="give it undo=Journal(depth) or Snapshot(), or write it after commit",
            )

    def checkpoint(self) -> None:
        """Begin a round: remember the value (Snapshot), forget what is pending (Journal)."""
        if isinstance(self.type.undo, Snapshot):
            self.arrays["saved"].copy_(self.value)
            self.arrays["drafted"].zero_()
        elif isinstance(self.type.undo, Journal):
            self.arrays["live"].zero_()

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """End a round with the accepted nodes of each row. Journal: the value written at the last accepted
        node that wrote one. Snapshot: a row that does not accept all its drafted tokens gets back the value
        of the checkpoint."""
        if len(paths) != self.rows:
            raise BadInput(f"commit of {len(paths)} paths; expected one for each of the {self.rows} rows")
        for b, path in enumerate(paths):
            if isinstance(self.type.undo, Journal):
                wrote = [i for i in path if bool(self.arrays["live"][b, i])]
                if wrote:
                    self.value[b] = self.arrays["pending"][b, wrote[-1]]
            elif isinstance(self.type.undo, Snapshot) and len(path) < int(self.arrays["drafted"][b]):
                self.value[b] = self.arrays["saved"][b]
        self.checkpoint()

    def fork(self) -> ArrayStore:
        """An independent copy."""
        new = ArrayStore(self.type, self.rows)
        for name, array in self.arrays.items():
            new.arrays[name].copy_(array)
        return new

    def bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

    def _overwrite(self, tokens: Tokens, values: torch.Tensor) -> None:
        last = torch.ones(len(tokens), dtype=torch.bool)
        last[:-1] = tokens.row[1:] != tokens.row[:-1]
        self.value[tokens.row[last]] = values[last]
