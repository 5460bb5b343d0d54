"""Ops of the generation program: calls, control flow, and the round of draft, verify and commit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from elision.ir import tree
from elision.ir.drafted import KINDS, Drafted
from elision.ir.drafting.run import DraftRun
from elision.ir.layout import row_bytes
from elision.ir.op import Cost, Sizes, bind_axes, need, op, substitute_type, token_axis
from elision.ir.requests import Requests
from elision.ir.states import KV, Array
from elision.ir.store import ArrayStore
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Host, Tensor
from elision.ir.value import Graph, Type, Types, Value
from elision.ir.verify import RULES

Run = Callable[[tuple[Any, ...]], tuple[Any, ...]]  # the op's target on these operands


def origin(state: Value) -> Value:
    """Where a state value begins (an input, `fresh` or `empty`), back through every op that consumed it."""
    while (before := consumes(state)) is not None:
        state = before
    return state


def consumes(state: Value) -> Value | None:
    """The state value that this one follows, or None for one that begins here (an input, `fresh`, `empty`)."""
    if state.op == "item":
        call, index = state.args[0], state.attr("index")
        assert isinstance(call.type, tuple)
        before = sum(isinstance(t, KV | Array) for t in call.type[:index])
        return [a for a in call.args if a.is_state][before]
    return next((a for a in state.args if a.is_state), None)


def call_type(*types: Types, graph: Graph, target: str, label: str = "", env: Any = ()) -> Types:
    need(len(types) == len(graph.inputs), f"{target} takes {len(graph.inputs)} operands, got {len(types)}")
    mapping = bind_axes([v.type for v in graph.inputs], list(types))
    actual: dict[Value, Any] = dict(zip(graph.inputs, types, strict=True))
    results: list[Type] = []
    for formal, given in actual.items():
        need(type(formal.type) is type(given), f"{graph.names[formal]} of {target} is a {type(formal.type).__name__}")
    for out in graph.outputs:
        assert not isinstance(out.type, tuple)
        results.append(actual.get(origin(out), out.type) if out.is_state else substitute_type(out.type, mapping))
    return results[0] if len(results) == 1 else tuple(results)


@op(call_type, cost=lambda *_: Cost())
def call(*x: Any, target: str, label: str = "", env: Any = (), run: Run) -> Any:
    """Run a template or an entry. ``label`` is ``<layer>.<half>`` for a block; ``env`` gives the template's `Env` attributes."""
    found = run(x)
    return found[0] if len(found) == 1 else found


def _same(graph: Graph, types: tuple[Types, ...]) -> Types:
    results = call_type(*types, graph=graph, target=graph.name)
    given = results if isinstance(results, tuple) else (results,)
    need(tuple(types[: len(given)]) == tuple(given), f"{graph.name} must give back its first operands' types")
    return results


def _when_type(cond: Tensor, *types: Types, graph: Graph, target: str) -> Types:
    need(cond.dtype == "bool" and cond.axes == (), f"expected a condition bool[], got {cond}")
    need(len(graph.outputs) == 1, f"{target} must give one result")
    return _same(graph, types)


@op(_when_type, cost=lambda *_: Cost())
def when(cond: torch.Tensor, *x: Any, target: str, run: Run) -> Any:
    """Run the template if the condition holds; otherwise its first operand passes through."""
    return run(x)[0] if bool(cond) else x[0]


def _repeat_type(*types: Types, graph: Graph, target: str, n: int) -> Types:
    need(n >= 1, f"n={n}; expected n >= 1")
    return _same(graph, types)


@op(_repeat_type, cost=lambda *_: Cost())
def repeat(*x: Any, target: str, n: int, run: Run) -> Any:
    """Run the template n times (at least once), its results taking the place of its first operands."""
    out: tuple[Any, ...] = ()
    for _ in range(n):
        out = run((*out, *x[len(out) :]))
    return out[0] if len(out) == 1 else out


def _checkpoint_type(S: KV | Array, *, depth: int) -> KV | Array:
    need(depth >= 1, f"depth={depth}; expected at least 1")
    return S


@op(_checkpoint_type)
def checkpoint(S: Any, *, depth: int) -> Any:
    """Open a round on a state: up to ``depth`` tokens from here on can be taken back until `commit`."""
    if isinstance(S, ArrayStore):  # a KV cache needs nothing: drafted tokens go to its Scratch
        S.checkpoint()
    return S


def _root_type(last: Tensor, *, axis: str) -> Tensor:
    need(last.dtype == "i64" and len(last.axes) == 1 and axis.isidentifier(), f"expected the last tokens i64[b], got {last}")
    return Tensor((Axis(axis, draft=True),), "i64")


@op(_root_type, makes_axis=True)
def root(last: torch.Tensor, *, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """The empty draft: a tree with only its root, the last committed token of each row ``[b]`` (plain decoding)."""
    return last, tree.roots(at)


def _draft_type(last: Tensor, requests: Host, drafts: Host, *, axis: str, methods: tuple[str, ...]) -> Tensor:
    need(drafts == Host("drafts") and len(methods) > 0, f"expected drafts and at least one method, got {drafts} and {methods}")
    return _root_type(last, axis=axis)


@op(_draft_type, makes_axis=True)
def draft(
    last: torch.Tensor, requests: Requests, drafts: DraftRun, *, axis: str, methods: tuple[str, ...], at: Tokens
) -> tuple[torch.Tensor, Tokens]:
    """Token trees under the last committed tokens ``[b]``: what the ``methods`` propose, merged and cut by the length policy
    (`elision.ir.drafting`). A tree may be its root alone."""
    return drafts.propose(last, requests, at)


def _learn_type(drafts: Host, ids: Tensor, best: Tensor, paths: Host) -> Host:
    need(best.tokens == ids.tokens and best.dtype == "i64", f"expected the best tokens of the draft's nodes, got {best}")
    return drafts


@op(_learn_type)
def learn(drafts: DraftRun, ids: torch.Tensor, best: torch.Tensor, paths: list[list[int]]) -> DraftRun:
    """Show the drafters a round's nodes, the likeliest successors of each, and the paths that were accepted."""
    drafts.learn(ids, best, paths)
    return drafts


def _warp_type(ids: Tensor, logits: Tensor, requests: Host) -> Tensor:
    token_axis(ids, logits)
    need(len(logits.axes) == 2, f"expected logits [t, vocab], got {logits}")
    return logits.with_dtype("f32")


@op(_warp_type)
def warp(ids: torch.Tensor, logits: torch.Tensor, requests: Requests, *, at: Tokens) -> torch.Tensor:
    """Probabilities ``[t, vocab]`` after each row's penalties, temperature, top-k, top-p and min-p, along each node's
    ancestors."""
    return requests.warp(logits, at, ids)


def _verify_type(
    ids: Tensor, logits: Tensor, best: Tensor, requests: Host, last: Tensor, *drawn: Tensor, kind: str | None = None,
    rule: str | None = None,
) -> tuple[Host, Tensor]:  # fmt: skip
    axis = token_axis(ids, logits, best, *drawn)
    need(axis == axis.root, "the tokens that verify reads cannot be restricted (rule axis)")
    need(kind is None or kind in KINDS, f"kind={kind!r}; expected one of {', '.join(KINDS)}")
    counts = {"point": (0,), "iid": (1, 2), "wor": (1,)}.get(kind or "point", ())
    need(len(drawn) in counts, f"{len(drawn)} operands on drafts of kind {kind}; point has none, iid q and draws, wor q")
    need(rule is None or rule in RULES, f"rule={rule!r}; expected one of {', '.join(RULES)}")
    if drawn:
        need(drawn[0] == logits.with_dtype("f32"), f"expected q like the logits, {logits.with_dtype('f32')}, got {drawn[0]}")
    if len(drawn) > 1:
        need(drawn[1] == Tensor((axis,), "i64"), f"expected draws i64[{axis}], got {drawn[1]}")
    return Host("paths"), last


@op(_verify_type)
def verify(
    ids: torch.Tensor,
    logits: torch.Tensor,
    best: torch.Tensor,
    requests: Requests,
    last: torch.Tensor,
    *drawn: torch.Tensor,
    kind: str | None = None,
    rule: str | None = None,
    at: Tokens,
) -> Any:
    """Accept a path of each row's tree by its request's rule and draw the token after it: ``(paths, next [b])``.

    ``best [t, k]``: the likeliest tokens of each node, the first of which is what greedy rows without penalties need.
    ``paths``: for each sequence, the accepted node indices, the root first (`elision.ir.verify`); empty for one not in the call.
    ``kind`` and ``drawn``, ``q [d, vocab]`` and ``draws [d]``, make the `Drafted` that some rules need; ``rule``: of all
    sampled rows, in the place of their requests' own.
    """
    return requests.verify(ids, logits, best, at, None if kind is None else Drafted(kind, *drawn), rule)


def _commit_type(S: KV | Array, paths: Host) -> KV | Array:
    return S


def _commit_cost(sizes: Sizes, types: list[Any], result: KV | Array, attrs: dict[str, Any]) -> Cost:
    """The accepted rows (at most those of the call) move from Scratch to the tail; an array is written."""
    moved = float(sizes.tokens * row_bytes(result)) if isinstance(result, KV) else float(sizes.state_bytes(result))
    return Cost(0.0, {0: moved}, moved)


@op(_commit_type, cost=_commit_cost)
def commit(S: Any, paths: list[list[int]]) -> Any:
    """Close the round: the accepted nodes join the state by the ordinary append, the rest is dropped."""
    S.commit(paths)
    return S


def _emit_type(ids: Tensor, paths: Host, nxt: Tensor) -> Host:
    return Host("tokens")


@op(_emit_type)
def emit(ids: torch.Tensor, paths: list[list[int]], nxt: torch.Tensor, *, at: Tokens) -> list[list[int]]:
    """The tokens that the round produced, per sequence: the accepted drafts (without the root) and the drawn one."""
    drawn = iter(nxt.tolist())
    drafts = [ids[at.of_row(r)[p[1:]]].tolist() if len(p) > 1 else [] for r, p in enumerate(paths)]
    return [[*tokens, next(drawn)] if p else [] for tokens, p in zip(drafts, paths, strict=True)]
