"""Ops of early exit: whether a token goes on, and a round whose nodes leave the stream where they are sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from elision.ir.deferred import Deferred
from elision.ir.nodes import nodes_of
from elision.ir.op import need, op, token_axis
from elision.ir.ops.depth import RunOn
from elision.ir.ops.program import call_type
from elision.ir.states import KV
from elision.ir.tokens import Tokens
from elision.ir.types import Tensor
from elision.ir.value import Graph, Types

#: What says how sure a token is, and its operands beside the stream: what that was a layer before, logits, or a fitted function.
RULES = {"similarity": 1, "softmax": 1, "classifier": 2}
_DECAY = 4.0  # k of CALM, section 3.3


def _undecided_type(h: Tensor, *more: Tensor, rule: str, threshold: float, length: int = 0) -> Tensor:
    need(rule in RULES, f"rule={rule!r}; expected one of {', '.join(RULES)}")
    need(len(more) in (RULES[rule], RULES[rule] + 1), f"{len(more)} operands beside the stream for rule {rule}")
    axis = token_axis(h, *more)
    on = Tensor((axis,), "bool")
    need(len(more) == RULES[rule] or more[-1] == on, f"expected bool[{axis}] last, got {more[-1]}")
    return on


@op(_undecided_type)
def undecided(h: torch.Tensor, *more: torch.Tensor, rule: str, threshold: float, length: int = 0, at: Tokens) -> torch.Tensor:
    """Which tokens ``[t]`` go on: those less sure than the threshold (CALM, Schuster et al. 2022, section 3).

    ``similarity``: the cosine of the stream ``h`` and what it was before the last layer; ``softmax``: the difference of the two
    largest probabilities of the logits; ``classifier``: ``sigmoid(w . h + b)``. A last operand more says which tokens are still
    there. ``length``: the threshold falls with the position t, ``0.9 threshold + 0.1 exp(-4 t / length)`` within 0 and 1. The
    token at position 0 goes on: it is in every prompt, and prompts run all layers."""
    if rule == "similarity":
        sure = torch.nn.functional.cosine_similarity(h.float(), more[0].float(), dim=-1)
    elif rule == "softmax":
        top = more[0].float().softmax(-1).topk(2, -1).values
        sure = top[:, 0] - top[:, 1]
    else:
        sure = torch.sigmoid(h.float() @ more[0].float() + more[1].float())
    limit = torch.full_like(sure, threshold)
    if length:
        limit = (0.9 * threshold + 0.1 * torch.exp(-_DECAY * at.pos / length)).clamp(0, 1).to(sure.dtype)
    on = (sure < limit) | (at.pos == 0)
    return on & more[-1] if len(more) > RULES[rule] else on


def _exits_type(ids: Tensor, *states: KV, graphs: Sequence[Graph], targets: tuple[str, ...], parts: int, held: int = 0) -> Types:
    need(parts >= 2 and len(targets) in (parts + 1, 2 * parts), f"{len(targets)} targets; expected {parts} parts, fills, a head")
    need(held in (0, parts - 1) and (not held or len(targets) == 2 * parts), f"held={held}; expected a state for every exit")
    x: Tensor = ids
    for i, graph in enumerate(graphs[:parts]):
        found = call_type(x, *states, graph=graph, target=graph.name)
        results = found if isinstance(found, tuple) else (found,)
        need(len(results) == len(states) + (2 if i < parts - 1 else 1), f"{graph.name} must give the stream, and who goes on")
        assert isinstance(results[0], Tensor)
        x = results[0]
    for graph in graphs[parts:-1]:
        late = graph.inputs[0].tensor if held else x
        call_type(late, *states, graph=graph, target=graph.name)
        need(late.with_axes() == x.with_axes(), f"{graph.name} takes {late}; expected the stream, {x}")
    return call_type(x, *states, graph=graphs[-1], target=targets[-1])


@op(_exits_type)
def exits(
    ids: torch.Tensor, *states: Any, targets: tuple[str, ...], parts: int, held: int = 0, run_on: RunOn, at: Tokens
) -> tuple[Any, ...]:
    """Run a step in ``parts`` (the first targets), each on the tokens that the one before leaves undecided, then the head (the
    last target) on the stream of all tokens where they left it. The targets in between, where there are any, give the caches of
    the parts after each exit the keys and values of what left there.

    With ``held``, the last states keep the stream of what left at each exit, and the targets in between run the parts after it
    on what is kept, once a token of its sequence goes on (`elision.ir.deferred`)."""
    if held:
        whole = Deferred(states, targets, parts, run_on, at).run(ids)
        return run_on(targets[-1], (whole, *states), at)
    fills, head = targets[parts:-1], targets[-1]
    x, tokens, here, whole = ids, at, torch.arange(len(ids)), torch.empty(0)
    for i, part in enumerate(targets[:parts]):
        h, *rest = run_on(part, (x, *states), tokens)
        whole = h if i == 0 else whole.index_copy(0, here, h)
        on = rest[0] if i < parts - 1 else torch.zeros(0)
        go, done = on.nonzero().flatten(), (on == 0).nonzero().flatten()
        if len(done) and fills:
            run_on(fills[i], (h[done], *states), tokens.gather(done))
        elif len(done):
            tokens = _unseen(tokens, done)
        if not len(go):
            break
        x, tokens, here = h[go], tokens.gather(go), here[go]
    return run_on(head, (whole, *states), at)


def _unseen(tokens: Tokens, gone: torch.Tensor) -> Tokens:
    """The tokens of a draft, to which some of them are no ancestors any more."""
    assert tokens.anc is not None
    bits = torch.zeros(tokens.rows, dtype=torch.int64)
    bits.index_add_(0, tokens.row[gone], torch.ones_like(gone) << nodes_of(tokens)[gone])
    return replace(tokens, anc=tokens.anc & ~bits[tokens.row])
