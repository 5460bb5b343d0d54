"""Caches with something in them, and the operands of the kernels of attention on them."""

from __future__ import annotations

from typing import Any

import torch
import triton

from elision.codegen.triton.attend import attend
from elision.codegen.triton.combine import combine
from elision.codegen.triton.forms import form
from elision.ir.mask import Mask
from elision.ir.nodes import nodes_of
from elision.ir.states import KV, Dense, Float, Int, Ring, Scratch, Segment, Slots
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack

NODES = 64


def kv(heads: int, dim: int, vdim: int, encoding: Float | Int, slots: Slots | None = None, **more: Any) -> KV:
    slots = slots or Dense()
    segments = (Segment(slots, encoding, encoding), Segment(Scratch(NODES), encoding, encoding))
    return KV(heads, dim, vdim, segments, **more)


def fill(store: KVStore, lengths: list[int], starts: list[int] | None = None, seed: int = 0) -> Tokens:
    """Append that many tokens to each sequence, a few at a time into a Ring."""
    type, generator = store.type, torch.Generator().manual_seed(seed)
    starts = starts or [0] * len(lengths)
    slots = type.main[-1].slots
    step = slots.chunk if isinstance(slots, Ring) else max(lengths, default=1)
    for at in range(0, max(lengths, default=0), max(step, 1)):
        tokens = Tokens.chunk([min(max(n - at, 0), step) for n in lengths], [s + at for s in starts])
        store.append(tokens, *(torch.randn(len(tokens), type.heads, d, generator=generator) for d in (type.dim, type.vdim)))
    return tokens


def trees(seed: int, counts: list[int], positions: list[int]) -> Tokens:
    """A random tree of so many nodes below each sequence."""
    choice = torch.Generator().manual_seed(seed)
    found = [Tree((-1, *(int(torch.randint(0, i, (1,), generator=choice)) for i in range(1, n)))) for n in counts]
    row, pos, parent, anc = pack(found, positions)
    return Tokens(row, pos, len(counts), parent, anc)


def axis(tokens: Tokens) -> dict[str, torch.Tensor]:
    """The arrays of a token axis that kernels read."""
    counts = torch.bincount(tokens.row, minlength=tokens.rows)
    found = {"row": tokens.row, "pos": tokens.pos, "start": torch.cat((counts.new_zeros(1), counts.cumsum(0)))}
    ahead = (
        tokens.ahead
        if tokens.ahead is not None
        else counts[tokens.row] - 1 - (torch.arange(len(tokens)) - found["start"][tokens.row])
    )
    found["ahead"] = ahead
    if tokens.anc is not None:
        assert tokens.parent is not None
        found |= {"anc": tokens.anc, "node": nodes_of(tokens), "parent": tokens.parent}
    return found


def arrays(store: KVStore, segment: int) -> tuple[torch.Tensor | None, ...]:
    """Keys, values, their scales and minima of a segment."""
    k, v = (store.segments[segment].planes[w].arrays for w in "kv")
    return k["codes"], v["codes"], k.get("scale"), v.get("scale"), k.get("low"), v.get("low")


def older(store: KVStore) -> tuple[Any, ...]:
    """The segment before the one that is appended to: its arrays, lengths, blocks and groups of keys."""
    if len(store.type.main) == 1:
        return (None,) * 9
    return *arrays(store, 0), store.len["k"][0], blocks(store), store.segments[0].planes["k"].arrays["scale"].shape[2]


def blocks(store: KVStore, segment: int = 0) -> int:
    return store.segments[segment].planes["k"].arrays["codes"].shape[2]


def attention(
    q: torch.Tensor, store: KVStore, tokens: Tokens, mask: Mask, scale: float, softcap: float = 0.0,
    sinks: torch.Tensor | None = None, slopes: torch.Tensor | None = None, *,
    splits: int = 1, pending: bool = False, kept: torch.Tensor | None = None, bm: int = 16,
    ordered: bool = False, pages: tuple[torch.Tensor, int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output and the log-sum-exp by kernels; of drafts with scores, the latter waits in the cache."""
    type, at = store.type, axis(tokens)
    heads, group_ = q.shape[1], q.shape[1] // type.heads
    gp = triton.next_power_of_2(group_) if pages is None else bm
    chosen, page, open = (None, 0, 0) if pages is None else pages
    slots = type.main[-1].slots
    ring = isinstance(slots, Ring)
    out = torch.full((len(tokens), heads, type.vdim), torch.nan, dtype=q.dtype)
    lse = torch.full((len(tokens), heads), torch.nan)
    dvp = max(16, triton.next_power_of_2(type.vdim))
    part = torch.full((splits, len(tokens), heads, dvp + 2), torch.nan)
    tail, first = store.tail, type.main[0]
    index = store.index
    waits = type.scores.depth if kept is None and type.scores is not None and tokens.drafted else 0
    if waits:
        kept, lse = index["waiting"], index["waiting_norm"]
    most = int(torch.bincount(tokens.row, minlength=tokens.rows).max())
    grid = (splits, -(-most // (bm // gp)), tokens.rows * type.heads)
    attend[grid](
        out, lse, part, kept, index.get("waiting_nodes"), kept.shape[-1] if kept is not None else 0, q, q.stride(0), at["pos"],
        at.get("anc"), at.get("node"), at["start"], slopes, sinks,
        *arrays(store, tail), store.pos, store.len["k"][tail], blocks(store, tail), store.pos.shape[2], *older(store),
        *arrays(store, len(store.segments) - 1), index["node_pos"], index["node_live"], len(tokens), splits,
        scale, softcap, mask.size, mask.sinks, slots.window if ring else 0, slots.sinks if ring else 0, chosen,
        H=type.heads, G=group_, GP=gp, D=type.dim, DV=type.vdim, DP=max(16, triton.next_power_of_2(type.dim)), DVP=dvp,
        LISTS=store.pos.shape[1], FORM_K=form(type.main[-1].k), FORM_V=form(type.main[-1].v), OLDER_K=form(first.k),
        OLDER_V=form(first.v), MASK=mask.kind, WAITING=waits,
        SOFTCAP=softcap > 0, SLOPES=slopes is not None, SINKS=sinks is not None, RING=ring, DRAFTED=tokens.drafted,
        PENDING=pending, ORDERED=ordered, NODES=NODES, PARTS=splits > 1, LSE=True, KEPT=kept is not None,
        LISTED=0 if chosen is None else chosen.shape[2], PAGE=page, OPEN=open, BM=bm, BN=16,
    )  # fmt: skip
    if splits > 1:
        combine[(len(tokens), heads)](
            out,
            lse,
            part,
            sinks,
            at["row"],
            at.get("node"),
            len(tokens),
            HEADS=heads,
            DV=type.vdim,
            DVP=dvp,
            SPLITS=splits,
            SINKS=sinks is not None,
            LSE=True,
            WAITING=waits,
        )
    return out, lse


def queries(n: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> torch.Tensor:
    return torch.randn(n, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=rtol, atol=rtol, equal_nan=False)
