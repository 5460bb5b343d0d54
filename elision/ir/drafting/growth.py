"""How a draft model's tree grows: which tokens become the children of a node."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from elision.errors import BadInput
from elision.ir.drafted import VERIFY
from elision.ir.drafting.forest import Forest, Node
from elision.ir.noise import RowKey, gumbel
from elision.ir.requests import Requests
from elision.ir.tree import MAX_NODES
from elision.ir.verify import Request
from elision.ir.warp import penalise, warp


@dataclass(frozen=True)
class Growth:
    """``length``: the most levels; ``stop``: no child is drafted where the draft's likeliest token is less likely than this;
    ``rule``: how sampled rows are verified. With "match" tokens are drawn with the verifier's own noise, so that they are those
    of plain sampling and drafts come true often; any other rule has noise of the draft's own."""

    length: int = 4
    stop: float = 0.0
    rule: str = "match"

    RULES: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str | None:
        """What `verify` has to know of the drafts; None where they are verified as if they were functions of the past."""
        return None if self.rule == "match" else "wor"

    def __post_init__(self) -> None:
        rules = ("match", *self.RULES)
        if self.rule not in rules:
            raise BadInput(f"rule={self.rule!r}; these drafts are verified by {', '.join(rules)}")
        if not 1 <= self.length < MAX_NODES or not 0 <= self.stop < 1:
            raise BadInput(f"length={self.length}, stop={self.stop}; expected 1 to {MAX_NODES - 1}, and 0 or more, less than 1")

    def children(self, forest: Forest, node: Node, q: torch.Tensor, item: Request, state: dict[Node, float]) -> list[Node]:
        """Add the children of a node, drawn from ``q [V]``; ``state``: by node, what this growth remembers of it."""
        raise NotImplementedError

    def goes_on(self, node: Node, state: dict[Node, float]) -> bool:
        """Whether a node may have children."""
        return True

    def scores(self, forest: Forest, node: Node, q: torch.Tensor, item: Request, draw: int = 0) -> torch.Tensor:
        """``[V]``: their order is that of tokens drawn from q one after another without replacement (of greedy rows, of q)."""
        place, i = node
        if item.greedy:
            return q
        key, root = RowKey(item.seed, item.row), forest.roots[place]
        if self.rule == "match" and not draw:
            noise = gumbel(key, root + forest.depth[place][i] + 1, VERIFY, len(q))
        else:
            noise = gumbel(key, root, f"guess {i} {draw}", len(q))
        return q.double().log() + noise


@dataclass(frozen=True)
class Chains(Growth):
    """``chains`` paths, drawn independently of one another; those that begin alike share their nodes."""

    chains: int = 1

    RULES: ClassVar[tuple[str, ...]] = ("chain", "block", "recursive", "k-seq")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chains < 1 or self.chains * self.length >= MAX_NODES:
            raise BadInput(f"{self.chains} chains of {self.length} tokens; expected 1 or more, of {MAX_NODES - 1} tokens at most")
        if self.chains > 1 and self.rule in ("chain", "block"):
            raise BadInput(f"rule {self.rule} verifies one chain, and there are {self.chains}: use k-seq, recursive or match")

    @property
    def kind(self) -> str | None:
        return None if self.rule == "match" else "wor" if self.chains == 1 else "iid"

    def children(self, forest: Forest, node: Node, q: torch.Tensor, item: Request, state: dict[Node, float]) -> list[Node]:
        drawn: dict[int, Node] = {}
        for k in range(int(state.get(node, self.chains))):
            token = int(self.scores(forest, node, q, item, k).argmax())
            if token not in drawn:
                drawn[token] = forest.add(node, token)
            state[drawn[token]] = state.get(drawn[token], 0) + 1
            if item.greedy:
                break
        return list(drawn.values())


@dataclass(frozen=True)
class Threshold(Growth):
    """The level form of DySpec (Xiong et al. 2024): a node with value v gives children without replacement, from what they leave
    of q (R), as long as v is at least ``1 / nodes``; a child y has the value ``v R[y]``, its next sibling ``v (1 - R[y])``."""

    nodes: int = 16

    RULES: ClassVar[tuple[str, ...]] = ("recursive",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.nodes < MAX_NODES:
            raise BadInput(f"nodes={self.nodes}; expected 1 to {MAX_NODES - 1}")

    def children(self, forest: Forest, node: Node, q: torch.Tensor, item: Request, state: dict[Node, float]) -> list[Node]:
        value, most = state.get(node, 1.0), self.nodes + 1 - forest.size(node[0])
        if most < 1:
            return []
        order = self.scores(forest, node, q, item).topk(min(most, len(q))).indices
        found, left = [], 1.0
        for token, p in zip(order.tolist(), q[order].tolist(), strict=True):
            if value * self.nodes < 1 or p <= 0:
                break
            share = min(p / left, 1.0) if left > 0 else 1.0
            found.append(forest.add(node, token))
            state[found[-1]] = value * share
            value, left = value * (1 - share), left - p
        return found

    def goes_on(self, node: Node, state: dict[Node, float]) -> bool:
        return state[node] * self.nodes >= 1


def distributions(forest: Forest, nodes: list[Node], logits: torch.Tensor, requests: Requests) -> torch.Tensor:
    """What children are drawn from at each node, ``float32 [m, V]``: the draft's logits by the request of the node's row; of
    greedy rows without the warps that do not change their order."""
    items = [requests.items[forest.rows[p]] for p, _ in nodes]
    if all(item.plain for item in items):
        return logits.float().softmax(-1)
    found = torch.empty(logits.shape, dtype=torch.float32)
    for i, (node, item) in enumerate(zip(nodes, items, strict=True)):
        history = requests.histories[forest.rows[node[0]]]
        history = torch.cat((history, history.new_tensor(forest.path(node))))
        line = logits[i : i + 1]
        found[i] = (penalise(line, [history], item.warp).softmax(-1) if item.greedy else warp(line, [history], item.warp))[0]
    return found


#: By the name of a method, how its trees grow.
GROWTHS: dict[str, Callable[..., Growth]] = {
    "layer-skip-draft": Chains,
    "spec-sampling": Chains,
    "spectr": Chains,
    "dyspec": Threshold,
    "del": Chains,
}


def growth_of(text: str) -> Growth:
    """The growth that ``name:field=value,..`` describes. Raises BadInput for one that is not known."""
    name, _, rest = text.partition(":")
    if name not in GROWTHS:
        raise BadInput(f"unknown drafter {name!r}; the models' drafters are {', '.join(sorted(GROWTHS))}")
    takes = inspect.signature(GROWTHS[name]).parameters
    fields = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
    try:
        return GROWTHS[name](**{k: type(takes[k].default)(v) for k, v in fields.items()})
    except (KeyError, TypeError, ValueError) as err:
        raise BadInput(f"drafter {text!r}: {err}; its fields are {', '.join(takes)}") from None
