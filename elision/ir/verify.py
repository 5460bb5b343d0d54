"""Verification rules: which path of a token tree is accepted, and which token comes after it.

V1 ``greedy``: a node continues to the child that holds the argmax; identical tokens to greedy decoding.
V2 ``match``: at each node a token is drawn with noise keyed on its absolute position, and the node continues
to the child that holds it; identical tokens to sampling one by one with the same key, for every tree that
does not depend on that noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elision.ir.noise import RowKey, gumbel
from elision.ir.warp import Warp, penalise, warp

#: The verifier's noise stream; drafters draw from others.
STREAM = "verify"


@dataclass(frozen=True)
class Request:
    """How one row draws its tokens: the warp's parameters, greedy or sampled, and the key of its noise."""

    warp: Warp = Warp()
    greedy: bool = True
    seed: int = 0
    row: int = 0

    @property
    def plain(self) -> bool:
        """Greedy, and by the logits as they are."""
        return self.greedy and self.warp.repetition_penalty == 1.0 and not self.warp.suppress

    @property
    def rule(self) -> str:
        """The rule's name in `RULES`."""
        return "greedy" if self.greedy else "match"


Draw = Callable[[torch.Tensor, torch.Tensor, Request, int], int]
Accepted = tuple[list[int], int]
Rule = Callable[[torch.Tensor, Sequence[int], int, torch.Tensor, torch.Tensor, Request], Accepted]


def draw_greedy(logits: torch.Tensor, history: torch.Tensor, request: Request, position: int) -> int:
    """The most likely token after the penalties, the smallest id of equal ones. ``logits [V]``."""
    return int(penalise(logits[None], [history], request.warp)[0].argmax())


def draw_match(logits: torch.Tensor, history: torch.Tensor, request: Request, position: int) -> int:
    """A draw from the warped distribution, by Gumbel noise keyed on the ``position`` of the drawn token."""
    p = warp(logits[None], [history], request.warp)[0].double()
    return int((p.log() + gumbel(RowKey(request.seed, request.row), position, STREAM, len(p))).argmax())


def walk(draw: Draw) -> Rule:
    """The rule that draws one token at each node and goes on to the child that holds it, until none does."""

    def rule(
        tokens: torch.Tensor,
        parent: Sequence[int],
        position: int,
        logits: torch.Tensor,
        history: torch.Tensor,
        request: Request,
    ) -> Accepted:
        children: dict[tuple[int, int], int] = {}
        for node, token in enumerate(tokens.tolist()):
            children.setdefault((parent[node], token), node)  # of equal siblings the first counts
        path = [0]
        while True:
            token = draw(logits[path[-1]], history, request, position + len(path))
            child = children.get((path[-1], token))
            if child is None:
                return path, token
            path.append(child)
            history = torch.cat((history, history.new_tensor([token])))

    return rule


RULES: dict[str, Rule] = {"greedy": walk(draw_greedy), "match": walk(draw_match)}


def verify(
    tokens: torch.Tensor,
    parent: Sequence[int],
    position: int,
    logits: torch.Tensor,
    history: torch.Tensor,
    request: Request,
) -> Accepted:
    """The accepted nodes of one row's tree, root first, and the token after them, by its rule.

    ``tokens [n]``, ``parent [n]`` (within the tree), ``position`` of the root, ``logits [n, V]``;
    ``history``: the committed tokens, the root last. Penalties of a node see its own ancestors.
    """
    return RULES[request.rule](tokens, parent, position, logits, history, request)


def draw(logits: torch.Tensor, history: torch.Tensor, request: Request) -> int:
    """The token after ``history`` by its ``logits [V]``: plain decoding is a tree of the root alone."""
    return verify(history[-1:], (-1,), len(history) - 1, logits[None], history, request)[1]
