"""What a token axis carries at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """The tokens of one axis in a call over ``rows`` sequences, sorted by row.

    ``row [n]``: the sequence of each token, ``pos [n]``: its absolute position (int64). ``parent [n]`` (drafts only): the
    index, within the row's nodes, of the node before it, -1 for a root; ``anc [n]`` (drafts only): bit j is set when node j
    of the same row is an ancestor of this one or itself (at most 64 nodes a row). ``ahead [n]`` (parts of a prompt only): how
    many tokens of the prompt come after it.
    """

    row: torch.Tensor
    pos: torch.Tensor
    rows: int
    parent: torch.Tensor | None = None
    anc: torch.Tensor | None = None
    ahead: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.row.shape[0])

    def gather(self, index: torch.Tensor) -> Tokens:
        """The tokens at ``index [m]``, with all that they carry."""
        pick = [None if x is None else x[index] for x in (self.parent, self.anc, self.ahead)]
        return Tokens(self.row[index], self.pos[index], self.rows, *pick)

    def of_row(self, row: int) -> torch.Tensor:
        """Indices into this axis of the tokens of one sequence."""
        return (self.row == row).nonzero().flatten()

    @property
    def drafted(self) -> bool:
        return self.anc is not None

    @staticmethod
    def chunk(lengths: list[int], starts: list[int], ends: list[int] | None = None) -> Tokens:
        """Committed tokens: for each row b, positions ``starts[b] .. starts[b] + lengths[b] - 1``; ``ends``: the lengths of the
        prompts that they are parts of."""
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        pos = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
        ahead = None if ends is None else torch.tensor(ends)[row] - 1 - pos
        return Tokens(row, pos, len(lengths), ahead=ahead)
