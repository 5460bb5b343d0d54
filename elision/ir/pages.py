"""Parts of a cache that a query reads: pages of entries, chosen for each token and key head.

The entries of a sequence before the last multiple of ``open`` (up to the token's position, or of a drafted token up to the root
of its tree) are closed: no round of drafts crosses such a multiple if the clock ticks there, so whether tokens are decoded one
by one or drafted, they choose among the same pages. Entries after it are always seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from elision.errors import BadInput
from elision.ir.layout import LANES
from elision.ir.states import Float, Summary

if TYPE_CHECKING:
    from elision.ir.store import KVStore
    from elision.ir.tokens import Tokens


@dataclass(frozen=True)
class Chosen:
    """``pages [t, heads, n]``: indices of pages of ``page`` entries, -1: none."""

    pages: torch.Tensor
    page: int
    open: int

    def visible(self, store: KVStore, q_pos: torch.Tensor, pages: torch.Tensor, n: int) -> torch.Tensor:
        """Which of the first ``n`` entries are seen, ``[B, H, T, n]``, by queries on a grid: ``q_pos [B, 1, T, 1]``, their
        ``pages [B, T, heads, m]``."""
        count = -(-n // self.page)
        found = torch.zeros(*pages.shape[:3], count + 1, dtype=torch.bool)
        found.scatter_(3, torch.where(pages < 0, count, pages), True)  # the last one takes what is -1
        wide = found[..., :count].repeat_interleave(self.page, 3)[..., :n].transpose(1, 2)
        return wide | (torch.arange(n) >= closed(store.totals()[:, :1, None, None], q_pos, self.open))


def closed(length: torch.Tensor, pos: torch.Tensor, open: int) -> torch.Tensor:
    """How many entries of a sequence of ``length`` are closed for a token at position ``pos``."""
    return torch.minimum(length, pos) // open * open


def summarise(store: KVStore, rows: torch.Tensor) -> None:
    """Summarise the pages of these sequences that have been completed since."""
    summary, done = _summary(store), store.index["summarised"]
    table = store.index["summary"]
    for row in rows.tolist():
        first, last = int(done[row]), int(store.totals()[row, 0]) // summary.page
        if last <= first:
            continue
        keys = torch.unflatten(_keys(store, row, first * summary.page, last * summary.page), 1, (-1, summary.page))
        page = torch.arange(first, last)
        block, lane = page // LANES, page % LANES
        found = torch.cat((keys.amax(2), keys.amin(2)), -1)  # [H, pages, 2 dim]
        table[row][:, block, :, lane] = found.transpose(0, 1).to(table.dtype)
        done[row] = last


def _keys(store: KVStore, row: int, first: int, last: int) -> torch.Tensor:
    """The keys ``[H, last - first, dim]`` of some entries of a sequence."""
    segment = store.segments[0]
    plane = segment.planes["k"]
    if isinstance(plane.enc, Float):  # a view
        begin = first // LANES
        blocks = plane.arrays["codes"][row, :, begin : -(-last // LANES)]
        return blocks.transpose(2, 3).flatten(1, 2)[:, first - begin * LANES : last - begin * LANES]
    b, slots = torch.full((1, 1, 1), row), torch.arange(first, last)
    return segment.read("k", b, store.heads, slots, store.dtype)[0]


def pick(q: torch.Tensor, store: KVStore, tokens: Tokens, n: int, page: int, open: int, first: int) -> torch.Tensor:
    """``pages [t, heads, n]``: the ``n`` closed pages that may hold the largest products with the queries ``q [t, Hq, dim]`` of
    each key head, ascending, -1 where there are fewer; the ``first`` ones in any case. Ties: the smaller index.

    The bound of a page is that of Quest (Tang et al. 2024): the sum over channels of max(q max k, q min k); of a cache without
    summaries it is the largest product itself. The largest bound of the group's queries counts.
    """
    heads = store.type.heads
    count = closed(store.totals()[:, 0][tokens.row], tokens.pos, open) // page
    most = max(int(count.max()) if len(count) else 0, 1)
    bound = q.new_full((len(tokens), heads, most), -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for row in sorted(set(tokens.row.tolist())):
        mine = tokens.of_row(row)
        whole = int(count[mine].max())
        if whole:
            x = torch.unflatten(q[mine].to(bound.dtype), 1, (heads, -1)).transpose(0, 1)  # [heads, t, group, dim]
            bound[mine, :, :whole] = _bounds(x, store, row, whole, page).amax(2).transpose(0, 1)
    index = torch.arange(most)
    there = index < count[:, None, None]
    rank = torch.where(index < first, torch.inf, bound).masked_fill(~there, -torch.inf)
    best = torch.argsort(rank, dim=-1, descending=True, stable=True)[..., :n]
    best = torch.where(there.expand_as(rank).gather(-1, best), best, most).sort(-1).values
    best = torch.nn.functional.pad(best, (0, n - best.shape[-1]), value=most)
    return torch.where(best == most, -1, best)


def _bounds(x: torch.Tensor, store: KVStore, row: int, count: int, page: int) -> torch.Tensor:
    """``[heads, t, group, count]``"""
    if store.type.summary is None:
        keys = store.entries("k", count * page, x.dtype)[row]
        return torch.unflatten(x @ keys.transpose(1, 2)[:, None], -1, (count, page)).amax(-1)
    if store.type.summary.page != page or int(store.index["summarised"][row]) < count:
        have = int(store.index["summarised"][row])
        raise BadInput(f"{store.type.summary} has {have} pages; expected {count} of {page} entries")
    table = store.index["summary"][row].to(x.dtype)  # [heads, blocks, 2 dim, lanes]
    table = table.transpose(1, 2).flatten(2)[..., :count]
    sided = torch.cat((x.clamp(min=0), x.clamp(max=0)), -1)
    return sided @ table[:, None]


def _summary(store: KVStore) -> Summary:
    if store.type.summary is None:
        raise BadInput("this cache has no summaries; give it KV(summary=Summary(page))")
    return store.type.summary
