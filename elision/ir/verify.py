"""Verification rules: which path of a token tree is accepted, and which token comes after it.

V1 ``greedy``: a node continues to the child that holds the argmax; identical tokens to greedy decoding.
V2 ``match``: at each node a token is drawn with noise keyed on its absolute position, and the node continues
to the child that holds it; identical tokens to sampling one by one with the same key, whatever the tree (a
draft may use the same noise). V3 to V6, which weigh what a draft was drawn from, are in `elision.ir.rejection`:
the same distribution, not the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from elision.errors import BadInput
from elision.ir.drafted import VERIFY, Drafted, Trees
from elision.ir.noise import RowKey, gumbel
from elision.ir.rejection import SAMPLED, Sampled
from elision.ir.tree import Tree
from elision.ir.warp import Warp, penalise, warp


@dataclass(frozen=True)
class Request:
    """How one row draws its tokens: the warp's parameters, greedy or sampled, the key of its noise, and the rule by
    which sampled drafts are verified (greedy rows have one of their own). Raises BadInput if there is no such rule."""

    warp: Warp = Warp()
    greedy: bool = True
    seed: int = 0
    row: int = 0
    rule: str = "match"

    def __post_init__(self) -> None:
        names = [name for name in RULES if name != "greedy"]
        if self.rule not in names:
            raise BadInput(f"rule={self.rule!r}; expected one of {', '.join(names)}")

    @property
    def plain(self) -> bool:
        """Greedy, and by the logits as they are."""
        return self.greedy and self.warp.repetition_penalty == 1.0 and not self.warp.suppress


Draw = Callable[[torch.Tensor, torch.Tensor, Request, int], int]
Accepted = tuple[list[int], int]
Rule = Callable[[torch.Tensor, Sequence[int], int, torch.Tensor, torch.Tensor, Request, Drafted | None], Accepted]


def draw_greedy(logits: torch.Tensor, history: torch.Tensor, request: Request, position: int) -> int:
    """The most likely token after the penalties, the smallest id of equal ones. ``logits [V]``."""
    return int(penalise(logits[None], [history], request.warp)[0].argmax())


def draw_match(logits: torch.Tensor, history: torch.Tensor, request: Request, position: int) -> int:
    """A draw from the warped distribution, by Gumbel noise keyed on the ``position`` of the drawn token."""
    p = warp(logits[None], [history], request.warp)[0].double()
    return int((p.log() + gumbel(RowKey(request.seed, request.row), position, VERIFY, len(p))).argmax())


def walk(draw: Draw) -> Rule:
    """The rule that draws one token at each node and goes on to the child that holds it, until none does."""

    def rule(
        tokens: torch.Tensor,
        parent: Sequence[int],
        position: int,
        logits: torch.Tensor,
        history: torch.Tensor,
        request: Request,
        drafted: Drafted | None,
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


def weigh(name: str, sampled: Sampled) -> Rule:
    """A rule of `elision.ir.rejection` for the tree of one row."""

    def rule(
        tokens: torch.Tensor,
        parent: Sequence[int],
        position: int,
        logits: torch.Tensor,
        history: torch.Tensor,
        request: Request,
        drafted: Drafted | None,
    ) -> Accepted:
        if drafted is None and len(tokens) > 1:
            raise BadInput(f"rule {name} needs the q that the drafts were drawn from, and got none: use rule match")
        if drafted is not None and drafted.q is not None and drafted.q.shape != logits.shape:
            q = list(drafted.q.shape)
            raise BadInput(f"q is {q}, but the logits are {list(logits.shape)}: a draft needs the vocabulary of its target")
        tree = Tree(tuple(parent))

        def p(rows: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
            node = int(nodes[0])
            past = torch.cat((history, tokens[tree.path(node)[1:]]))
            return warp(logits[node : node + 1], [past], request.warp).double()

        given = (drafted or Drafted("point")).part(None)
        key = RowKey(request.seed, request.row)
        node, token = sampled(Trees(tokens[None], torch.tensor([tree.parent]), given, p, [key], [position]))
        return tree.path(int(node)), int(token)

    return rule


RULES: dict[str, Rule] = {
    "greedy": walk(draw_greedy),
    "match": walk(draw_match),
    **{name: weigh(name, sampled) for name, sampled in SAMPLED.items()},
}


def verify(
    tokens: torch.Tensor,
    parent: Sequence[int],
    position: int,
    logits: torch.Tensor,
    history: torch.Tensor,
    request: Request,
    drafted: Drafted | None = None,
) -> Accepted:
    """The accepted nodes of one row's tree, root first, and the token after them, by its rule.

    ``tokens [n]``, ``parent [n]`` (within the tree), ``position`` of the root, ``logits [n, V]``;
    ``history``: the committed tokens, the root last; ``drafted``: what the tokens were drawn from, which V3 to V6
    need. Penalties of a node see its own ancestors. Raises BadInput for a draft that the rule cannot verify.
    """
    rule = RULES["greedy" if request.greedy else request.rule]
    return rule(tokens, parent, position, logits, history, request, drafted)


def draw(logits: torch.Tensor, history: torch.Tensor, request: Request) -> int:
    """The token after ``history`` by its ``logits [V]``: plain decoding is a tree of the root alone."""
    return verify(history[-1:], (-1,), len(history) - 1, logits[None], history, request)[1]
