"""The meaning of `attend`: softmax attention of tokens over a cache, and over the drafted nodes in its
Scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elision.errors import BadInput, IllegalProgram
from elision.ir.mask import Mask
from elision.ir.nodes import counts_of
from elision.ir.pages import Chosen
from elision.ir.states import Ring
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

RESULTS = ("lse", "mass")


def attend(
    q: torch.Tensor,
    store: KVStore,
    tokens: Tokens,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    results: Sequence[str] = (),
    chosen: Chosen | None = None,
) -> tuple[torch.Tensor, ...]:
    """Attention of ``q [n, Hq, D]`` over the entries of each token's row: ``(out [n, Hq, Dv], *results)``.

    Query head h reads cache head ``h // (Hq / H)``. With s = scale q.k, then c tanh(s / c) if ``softcap`` is
    c, plus ``slopes[h] (k_pos - q_pos)`` (ALiBi, Press et al. 2022): out = sum exp(s) v / (sum exp(s) +
    exp(sinks[h])). An entry is visible when ``mask`` says so and, in a Ring, while ``k_pos < sinks or q_pos -
    k_pos < window``; a drafted query sees, by the same two rules, node j of its row in Scratch when bit j of
    its ``anc`` is set. Of older entries it sees those of its pages, if these are ``chosen``. Half precision is computed in fp32.

    Results: ``lse [n, Hq]``, the log of the denominator; ``mass [B, H, C]``, the probability that each entry
    of the logical list (not Scratch) received, summed over the queries of this call and the query heads of
    the cache head. A query that sees nothing gives zeros and an lse of -inf (of the sink, if there is one).
    Raises IllegalProgram (rule validity) if the store is poisoned and something visible was never written.
    """
    if any(r not in RESULTS for r in results):
        raise BadInput(f"attend: unknown results {list(results)}; expected some of {', '.join(RESULTS)}")
    found = weigh(q, store, tokens, mask, scale, softcap, sinks, slopes, chosen)
    weight, n = found.weight, found.entries
    values = store.entries("v", n, weight.dtype)
    if drafts := weight.shape[-1] - n:
        values = torch.cat((values, store.drafted("v", drafts, weight.dtype)), 2)
    out = (weight.flatten(2, 3) @ values).view(*weight.shape[:4], -1) / found.share
    given = [found.tokens_of(out).to(q.dtype)]
    for name in results:
        if name == "lse":
            given.append(found.tokens_of(found.top + found.total.log()))
        else:
            mass = weight.new_zeros(*weight.shape[:2], store.pos.shape[2])
            mass[:, :, :n] = (weight / found.share)[..., :n].sum((2, 3))
            given.append(mass)
    return tuple(given)


@dataclass(frozen=True)
class Weighed:
    """The weights ``exp(s - top)`` that queries give, ``[B, H, group, T, entries + nodes]`` on a grid of the tokens of each row,
    0 for what is hidden; ``top`` and ``total`` (the denominator) ``[B, H, group, T]``."""

    weight: torch.Tensor
    top: torch.Tensor
    total: torch.Tensor
    entries: int  # of the logical list; the drafted nodes follow
    place: torch.Tensor  # of each token in the grid
    full: bool  # whether tokens fill it

    @property
    def share(self) -> torch.Tensor:
        """What weights are divided by, ``[B, H, group, T, 1]``; 1 where nothing is seen."""
        return torch.where(self.total > 0, self.total, 1)[..., None]

    def tokens_of(self, y: torch.Tensor) -> torch.Tensor:
        """``[B, H, group, T, ...]`` to ``[n, Hq, ...]``"""
        flat = y.movedim(3, 1).flatten(2, 3).flatten(0, 1)
        return flat if self.full else flat[self.place]


def weigh(
    q: torch.Tensor,
    store: KVStore,
    tokens: Tokens,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    chosen: Chosen | None = None,
) -> Weighed:
    """The softmax of `attend` before its division."""
    heads, group = store.type.heads, q.shape[1] // store.type.heads
    if q.shape[1] % heads or q.shape[2] != store.type.dim:
        raise BadInput(
            f"attend: queries {list(q.shape)} do not fit a cache of {heads} heads of {store.type.dim}"
        )
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, n = store.rows, int(store.totals().max())
    rank, counts = counts_of(tokens)
    width = max(int(counts.max()), 1)
    place = tokens.row * width + rank  # of each token in a [B, T] grid
    full = len(tokens) == rows * width

    def grid(x: torch.Tensor) -> torch.Tensor:
        padded = x if full else x.new_zeros(rows * width, *x.shape[1:]).index_copy(0, place, x)
        return padded.view(rows, width, *x.shape[1:])

    q_pos = grid(tokens.pos)[:, None, :, None]  # [B, 1, T, 1]
    seen, k_pos = _main_visible(store, mask, q_pos, n), store.pos[:, :, None, :n]
    keys = store.entries("k", n, wide)
    if chosen is not None:
        seen = seen & chosen.visible(store, q_pos, grid(chosen.pages), n)
    if tokens.anc is not None and store.type.scratch is not None:
        visible, node_pos = _draft_visible(store, mask, q_pos, grid(tokens.anc))
        seen = torch.cat((seen, visible.expand(-1, seen.shape[1], -1, -1)), -1)
        k_pos = torch.cat((k_pos, node_pos.expand(-1, k_pos.shape[1], -1, -1)), -1)
        keys = torch.cat((keys, store.drafted("k", node_pos.shape[-1], wide)), 2)
    if not full:
        seen = seen & grid(torch.ones_like(tokens.row)).bool()[:, None, :, None]
    if store.poison is not None:
        _check_written(store, seen[..., :n])

    x = grid(q.to(wide).contiguous() * scale).view(rows, width, heads, group, -1).permute(0, 2, 3, 1, 4)
    s = (x.flatten(2, 3) @ keys.transpose(2, 3)).view(
        rows, heads, group, width, -1
    )  # [B, H, group, T, entries]
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    if slopes is not None:
        s = s + slopes.to(wide).view(heads, group, 1, 1) * (k_pos - q_pos)[:, :, None]
    s = s.masked_fill_(~seen[:, :, None], -torch.inf)

    top = s.amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    sink = None if sinks is None else sinks.to(wide).view(heads, group, 1)
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0)  # nothing to see
    weight = s.sub_(top[..., None]).exp_()
    total = weight.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink - top)
    return Weighed(weight, top, total, n, place, full)


def _main_visible(store: KVStore, mask: Mask, q_pos: torch.Tensor, n: int) -> torch.Tensor:
    """``[B, G, T, n]``"""
    k_pos, entry = store.pos[:, :, None, :n], torch.arange(n)
    seen = mask.visible(q_pos, k_pos) & (entry < store.totals()[..., None, None])
    start = store.ring_from()
    if start is not None:
        seen &= _in_ring(store, q_pos, k_pos) | (entry < start[..., None, None])
    return seen


def _draft_visible(
    store: KVStore, mask: Mask, q_pos: torch.Tensor, anc: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which nodes each query sees, ``[B, 1, T, nodes]``, and the nodes' positions ``[B, 1, 1, nodes]``."""
    k_pos = store.index["node_pos"][:, None, None]
    seen = mask.visible(q_pos, k_pos) & ((anc[:, None, :, None] >> torch.arange(k_pos.shape[-1])) & 1).bool()
    seen &= store.index["node_live"][:, None, None]
    return seen & _in_ring(store, q_pos, k_pos), k_pos


def _in_ring(store: KVStore, q_pos: torch.Tensor, k_pos: torch.Tensor) -> torch.Tensor:
    """Whether the entries of the tail are still in sight: all of them, unless it is a Ring."""
    slots = store.type.main[-1].slots
    if not isinstance(slots, Ring):
        return torch.ones((), dtype=torch.bool)
    return (k_pos < slots.sinks) | (q_pos - k_pos < slots.window)


def _check_written(store: KVStore, seen: torch.Tensor) -> None:
    written = store.written
    assert written is not None
    if bool((seen & ~written[:, :, None, : seen.shape[-1]]).any()):
        raise IllegalProgram(
            "validity",
            "attend sees a cache entry that was never written",
            sides=f"attend over {store.type.heads} heads of {store.type.segments}",
            because="its key or value was not appended, moved or filled",
            help="recompute, propagate or defer it, or declare it absent (present)",
        )
