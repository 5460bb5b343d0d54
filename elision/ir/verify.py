"""Verification rules: which path of a token tree is accepted, and which token comes after it.

V1 ``greedy``: a node continues to the child that holds the argmax; identical tokens to greedy decoding.
V2 ``match``: at each node a token is drawn with noise keyed on its absolute position, and a node continues to the child that holds
it; identical tokens to sampling one by one with the same key, for every tree that does not depend on that noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elision.ir.noise import RowKey, gumbel
from elision.ir.warp import Warp, penalise, warp

STREAM = "verify"


@dataclass(frozen=True)
class Request:
    """How one row draws its tokens: the warp's parameters, greedy or sampled, and the key of its noise."""

    warp: Warp = Warp()
    greedy: bool = True
    seed: int = 0
    row: int = 0

    @property
    def rule(self) -> str:
        """The rule's name in `RULES`."""
        return "greedy" if self.greedy else "match"


Draw = Callable[[torch.Tensor, torch.Tensor, Request, int], int]


def draw_greedy(logits: torch.Tensor, history: torch.Tensor, request: Request, position: int) -> int:
    """The most likely token after the penalties, the smallest id of equal ones. ``logits [V]``."""
    return int(penalise(logits[None], [history], request.warp)[0].argmax())


def draw_match(logits: torch.Tensor, history: torch.Tensor, request: Request, position: int) -> int:
    """A draw from the warped distribution by Gumbel noise keyed on the ``position`` of the token that is drawn."""
    p = warp(logits[None], [history], request.warp)[0].double()
    return int((p.log() + gumbel(RowKey(request.seed, request.row), position, STREAM, len(p))).argmax())


RULES: dict[str, Draw] = {"greedy": draw_greedy, "match": draw_match}


def verify(
    tokens: torch.Tensor, parent: Sequence[int], position: int, logits: torch.Tensor, history: torch.Tensor, request: Request
) -> tuple[list[int], int]:
    """Walk one row's tree from its root: the accepted nodes (the root first) and the token after the last.

    ``tokens [n]``, ``parent [n]`` (within the tree), ``position`` of the root, ``logits [n, V]``; ``history``: the committed tokens, the
    root last. Penalties of a node see its own ancestors.
    """
    draw = RULES[request.rule]
    children: dict[tuple[int, int], int] = {}
    ids = tokens.tolist()
    for node in range(len(ids) - 1, 0, -1):
        children[parent[node], ids[node]] = node  # of equal siblings the first counts
    path = [0]
    while True:
        node = path[-1]
        nxt = draw(logits[node], history, request, position + len(path))
        child = children.get((node, nxt))
        if child is None:
            return path, nxt
        path.append(child)
        history = torch.cat((history, history.new_tensor([nxt])))
