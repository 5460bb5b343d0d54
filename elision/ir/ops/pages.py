"""Which pages of a cache a token reads (`elision.ir.pages`)."""

from __future__ import annotations

from typing import Any

import torch

from elision.ir import pages
from elision.ir.layout import row_bytes, slot_count
from elision.ir.op import Cost, Sizes, need, op, token_axis
from elision.ir.states import KV
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.types import Tensor


def _summarise_type(S: KV, rows: Tensor) -> KV:
    token_axis(rows)
    need(S.summary is not None, "expected a cache with summaries")
    return S


def _summarise_cost(sizes: Sizes, types: list[Any], result: Any, attrs: dict[str, Any]) -> Cost:
    """The keys of one page of every sequence."""
    S = types[0]
    keys = row_bytes(S) * S.dim / (S.dim + S.vdim)
    return Cost(0.0, {0: sizes.rows * S.summary.page * keys}, 2 * sizes.rows * keys)


@op(_summarise_type, cost=_summarise_cost)
def summarise(S: KVStore, rows: torch.Tensor) -> KVStore:
    """Of the sequences ``rows [b]``, summarise the pages that are complete and are not yet."""
    pages.summarise(S, rows)
    return S


def _pick_type(q: Tensor, S: KV, *, n: int, page: int, open: int, room: int, first: int = 0) -> Tensor:
    axis, heads = token_axis(q), q.axes[1]
    need(len(q.axes) == 3 and q.axes[2] == S.dim, f"expected queries [t, heads, {S.dim}], got {q}")
    need(isinstance(heads, int) and heads % S.heads == 0, f"{heads} query heads over {S.heads} key heads")
    need(page >= 1 and open % page == 0 and open >= page, f"page={page}, open={open}; expected pages of at least 1 in open")
    need(n >= 1 and 0 <= first <= n and room >= 1, f"n={n}, first={first}, room={room}; expected 0 <= first <= n >= 1, room >= 1")
    need(S.summary is None or S.summary.page == page, f"pages of {page}, and {S.summary}")
    need(S.keyed_by == "position" and len(S.main) == 1, "expected a cache of one segment whose entry i holds position i")
    return Tensor((axis, S.heads, n), "i64")


def _pick_cost(sizes: Sizes, types: list[Any], result: Any, attrs: dict[str, Any]) -> Cost:
    """A look at the summaries, or at the keys."""
    q, S = types[:2]
    entries = min(sizes.context, sum(slot_count(s.slots, sizes.context) for s in S.main))
    share = (2 / attrs["page"] if S.summary is not None else 1.0) * S.dim / (S.dim + S.vdim)
    flops = 2.0 * sizes.of(q.axes[0]) * entries * q.axes[1] * S.dim * (2 / attrs["page"] if S.summary is not None else 1.0)
    return Cost(flops, {0: float(sizes.bytes(q)), 1: sizes.rows * entries * row_bytes(S) * share}, float(sizes.bytes(result)))


@op(_pick_type, cost=_pick_cost)
def pick(
    q: torch.Tensor, S: KVStore, *, n: int, page: int, open: int, room: int, first: int = 0, at: Tokens
) -> torch.Tensor:
    """The ``n`` pages ``[t, kv heads, n]`` of ``page`` entries that may hold the keys with the largest products with the queries
    ``[t, heads, dim]``, ascending, then -1: of those before the last multiple of ``open``, the ``first`` ones in any case (see
    `elision.ir.pages`). ``room``: entries that a sequence has at most."""
    return pages.pick(q, S, at, n, page, open, first)
