"""Ops that run as much of the model as a token needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from elision.ir.op import need, op
from elision.ir.ops.program import call_type
from elision.ir.requests import Requests
from elision.ir.states import KV
from elision.ir.tokens import Tokens
from elision.ir.types import Host, Tensor
from elision.ir.value import Graph, Types

#: Runs a target on operands and tokens of the op's own.
RunOn = Callable[[str, tuple[Any, ...], Tokens], tuple[Any, ...]]


def stages(until: Sequence[int], at: Tokens) -> list[tuple[int, torch.Tensor]]:
    """Targets by number, each with the indices ``[m]`` of the tokens that it runs: those of the rows whose root it is for."""
    root = at.pos[torch.searchsorted(at.row, at.row)]
    stage = torch.bucketize(root, torch.tensor(until), right=True)
    return [(s, (stage == s).nonzero().flatten()) for s in sorted(set(stage.tolist()))]


def _staged_type(ids: Tensor, *states: KV, graphs: Sequence[Graph], targets: tuple[str, ...], until: tuple[int, ...]) -> Types:
    need(len(until) == len(targets) - 1 >= 1, f"{len(targets)} targets end at {until}; expected two or more, the last without")
    need(list(until) == sorted(set(until)) and until[0] > 0, f"until={until}; expected positions, each after the one before")
    return _alike(ids, states, graphs)


def _alike(ids: Tensor, states: tuple[KV, ...], graphs: Sequence[Graph]) -> Types:
    """What all of the steps give."""
    found = [call_type(ids, *states, graph=g, target=g.name) for g in graphs]
    need(all(f == found[0] for f in found), f"{', '.join(g.name for g in graphs)} give results of different types")
    return found[0]


@op(_staged_type)
def staged(
    ids: torch.Tensor, *states: Any, targets: tuple[str, ...], until: tuple[int, ...], run_on: RunOn, at: Tokens
) -> tuple[Any, ...]:
    """Run a step that is one of several by the position of each row's root: number i ends at position ``until[i]``. A cache that
    a target leaves alone gets nothing of the rows that it runs."""
    return _by_part(stages(until, at), ids, states, targets, run_on, at)


def routes(depth: Sequence[int], at: Tokens) -> list[tuple[int, torch.Tensor]]:
    """As `stages`, by the number that each row has chosen."""
    stage = torch.tensor(depth)[at.row]
    return [(s, (stage == s).nonzero().flatten()) for s in sorted(set(stage.tolist()))]


def _routed_type(
    requests: Host, ids: Tensor, *states: KV, graphs: Sequence[Graph], targets: tuple[str, ...], threshold: float
) -> Types:
    need(requests == Host("requests") and len(targets) > 1, f"expected requests and several targets, got {requests}, {targets}")
    return _alike(ids, states, graphs)


@op(_routed_type)
def routed(
    requests: Requests, ids: torch.Tensor, *states: Any, targets: tuple[str, ...], threshold: float, run_on: RunOn, at: Tokens
) -> tuple[Any, ...]:
    """Run a step that is one of several by what each row's prompt chose (FiRST, Jain et al. 2024): target i leaves out what the
    first i routers of ``prefill`` speak for (its results after the logits, ``f32[t, 1]``; the mean over the prompt of their
    sigmoid is less than the threshold): the choice is the last target that leaves out nothing else."""
    return _by_part(routes(requests.depth, at), ids, states, targets, run_on, at)


def chosen(means: torch.Tensor, threshold: float) -> list[int]:
    """The target of every row, from the routers' means ``[rows, routers]``."""
    return list(map(int, (means < threshold).long().cumprod(1).sum(1)))


def _by_part(
    stages: list[tuple[int, torch.Tensor]],
    ids: torch.Tensor,
    states: tuple[Any, ...],
    targets: tuple[str, ...],
    run_on: RunOn,
    at: Tokens,
) -> tuple[Any, ...]:
    parts = [(index, run_on(targets[i], (ids[index], *states), at.gather(index))) for i, index in stages]
    if len(parts) == 1:
        return parts[0][1]
    count = len(parts[0][1]) - len(states)
    whole = [x.new_empty((len(ids), *x.shape[1:])) for x in parts[0][1][:count]]
    for index, found in parts:
        for out, x in zip(whole, found, strict=False):
            out[index] = x
    return (*whole, *states)
