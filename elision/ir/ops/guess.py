"""Ops of rounds whose drafts a model makes: feed its own caches, let it grow trees, drop what it drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from elision.ir.drafted import KINDS
from elision.ir.drafting.model import ModelRun
from elision.ir.op import need, op
from elision.ir.requests import Requests
from elision.ir.states import KV
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Host, Tensor
from elision.ir.value import Graph

#: Runs a target on operands and tokens of the op's own.
RunOn = Callable[[str, tuple[Any, ...], Tokens], tuple[Any, ...]]


def _check(graphs: Sequence[Graph], drafts: Host, last: Tensor, caches: tuple[KV, ...], draft: bool) -> Tensor:
    """The type of the targets' logits, if they take ids at an axis of that kind, then these caches, and give both back."""
    need(drafts == Host("drafts"), f"expected drafts, got {drafts}")
    need(last.dtype == "i64" and len(last.axes) == 1, f"expected the last tokens i64[b], got {last}")
    need(len(graphs) > 0 and all(isinstance(c, KV) for c in caches), "expected at least one target, and caches")
    for graph in graphs:
        ids, *states = [v.type for v in graph.inputs]
        fits = isinstance(ids, Tensor) and ids.dtype == "i64" and ids.tokens is not None and ids.tokens.drafted == draft
        need(fits and states == list(caches), f"{graph.name} must take ids and {len(caches)} caches")
    logits = {g.outputs[0].tensor.axes[1:] for g in graphs}
    need(len(logits) == 1, "the targets' logits differ in size")
    return graphs[0].outputs[0].tensor


def _feed_type(
    requests: Host, drafts: Host, last: Tensor, *caches: KV, graphs: Sequence[Graph], targets: tuple[str, ...]
) -> tuple[Host | KV, ...]:
    _check(graphs, drafts, last, caches, draft=False)
    need(len(targets) == 1 and len(caches) > 0, f"{len(targets)} targets and {len(caches)} caches; expected 1, and some")
    return (drafts, *caches)


@op(_feed_type)
def feed(
    requests: Requests, drafts: ModelRun, last: torch.Tensor, *caches: Any, targets: tuple[str, ...], run_on: RunOn, at: Tokens
) -> tuple[Any, ...]:
    """Bring the caches of a draft model up to the roots (``last [b]``, committed tokens that they do not hold yet): those of its
    entry's run over what is missing. Nothing runs where this round will not be drafted, so a drafter that does not pay costs
    nothing."""
    drafts.feed(requests, at, caches[0].totals()[:, 0].tolist(), lambda ids, nodes: run_on(targets[0], (ids, *caches), nodes)[0])
    return (drafts, *caches)


def _guess_type(
    requests: Host,
    drafts: Host,
    last: Tensor,
    *caches: KV,
    graphs: Sequence[Graph],
    targets: tuple[str, ...],
    axis: str,
    methods: tuple[str, ...],
    kind: str | None = None,
) -> tuple[Tensor | KV, ...]:
    logits = _check(graphs, drafts, last, caches, draft=True)
    need(axis.isidentifier() and len(methods) == 1, f"axis={axis!r}, methods={methods}; expected a name and one method")
    need(kind in (None, *KINDS[1:]), f"kind={kind!r}; expected none, {' or '.join(KINDS[1:])}")
    made = Axis(axis, draft=True)
    drawn = {None: (), "wor": ("f32",), "iid": ("f32", "i64")}[kind]
    types = [Tensor((made, *logits.axes[1:]) if dtype == "f32" else (made,), dtype) for dtype in drawn]
    return (Tensor((made,), "i64"), *types, *caches)


@op(_guess_type, makes_axis=True)
def guess(
    requests: Requests,
    drafts: ModelRun,
    last: torch.Tensor,
    *caches: Any,
    targets: tuple[str, ...],
    axis: str,
    methods: tuple[str, ...],
    kind: str | None = None,
    run_on: RunOn,
    at: Tokens,
) -> tuple[tuple[Any, ...], Tokens]:
    """Token trees under the last committed tokens ``[b]`` that a model grows level by level: one of the ``targets`` runs on the
    newest nodes, whose ancestors its earlier runs have left in Scratch.

    Gives ids ``[d]``, what the draft's ``kind`` needs for `verify` (``q [d, vocab]``, for "iid" also ``draws [d]``), and the
    caches (`elision.ir.drafting.model`). A tree may be its root alone."""
    ids, drawn, nodes = drafts.grow(last, requests, at, kind, lambda i, ids, nodes: run_on(targets[i], (ids, *caches), nodes)[0])
    return (ids, *drawn, *caches), nodes


def _drop_type(S: KV) -> KV:
    need(isinstance(S, KV), "expected a cache")
    return S


@op(_drop_type)
def drop(S: Any) -> Any:
    """Close the round on a cache of the drafter's own: nothing of what was drafted joins it. `feed` brings what was accepted."""
    S.drop()
    return S
