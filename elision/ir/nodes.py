"""Which tokens of a call belong to which row, which node of a draft each is, and the tokens of accepted
paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elision.errors import BadInput
from elision.ir.tokens import Tokens

_ALL = (1 << 64) - 1  # an ancestor set as an unsigned number


def counts_of(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank ``[n]`` of each token within its row, and the number of tokens ``[B]`` of each row."""
    n = len(tokens)
    if tokens.rows == 1:
        return torch.arange(n), torch.tensor([n])
    counts = torch.bincount(tokens.row, minlength=tokens.rows)
    return torch.arange(n) - (counts.cumsum(0) - counts)[tokens.row], counts


def nodes_of(tokens: Tokens) -> torch.Tensor:
    """The node index ``[n]`` of drafted tokens: their highest ancestor bit, because a node comes after its
    ancestors."""
    assert tokens.anc is not None
    return torch.tensor([(bits & _ALL).bit_length() - 1 for bits in tokens.anc.tolist()], dtype=torch.int64)


def path_tokens(
    paths: Sequence[Sequence[int]], pos: torch.Tensor, live: torch.Tensor
) -> tuple[Tokens, torch.Tensor]:
    """The committed tokens of the accepted nodes ``paths[b]``, and the node ``[n]`` of each; ``pos`` and
    ``live [B, N]`` say what was drafted. Raises BadInput for a node that was not."""
    if len(paths) != len(live):
        raise BadInput(f"commit of {len(paths)} paths; expected one for each of the {len(live)} rows")
    row = torch.repeat_interleave(torch.arange(len(paths)), torch.tensor([len(p) for p in paths]))
    node = torch.tensor([i for p in paths for i in p], dtype=torch.int64)
    drafted = (node >= 0) & (node < live.shape[1])
    if not bool(drafted.all()) or not bool(live[row, node].all()):
        raise BadInput(f"commit of nodes {[list(p) for p in paths]}: not all of them were drafted")
    return Tokens(row, pos[row, node].long(), len(paths)), node
