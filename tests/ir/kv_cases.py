"""Cache types and helpers that the tests of states share."""

from __future__ import annotations

import torch

from elision.ir.states import KV, Budget, Dense, Encoding, Float, Int, Paged, Ring, Scratch, Segment, Slots
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

HEADS, DIM, VDIM, CAPACITY = 2, 4, 6, 40
F64 = Float("f64")
CHANNEL8, CHANNEL4 = Int(8, "channel", 2), Int(4, "channel", 2, zero=True)
TOKEN8, TOKEN4 = Int(8, "token", 4), Int(4, "token", 4, zero=True)


def kv(*segments: Segment, keep: str = "per_layer", scratch: bool = True) -> KV:
    tail = segments[-1]
    extra = (Segment(Scratch(16), tail.k, tail.v),) if scratch else ()
    return KV(HEADS, DIM, VDIM, (*segments, *extra), keyed_by="explicit", keep=keep)


def seg(slots: Slots, k: Encoding = F64, v: Encoding | None = None, shared: bool = False) -> Segment:
    return Segment(slots, k, k if v is None else v, shared)


ARRANGEMENTS: dict[str, tuple[Segment, ...]] = {
    "dense": (seg(Dense()),),
    "dense-int8": (seg(Dense(), CHANNEL8),),
    "ring": (seg(Ring(6, 2, 12)),),
    "ring-int4": (seg(Ring(5, 0, 12), CHANNEL4),),
    "budget": (seg(Budget(36)),),
    "paged": (seg(Paged(4)),),
    "paged-int8": (seg(Paged(4), CHANNEL8, CHANNEL4),),
    "int8+tail": (seg(Dense(), CHANNEL8), seg(Budget(36))),
    "int4+tail": (seg(Dense(), CHANNEL4), seg(Dense())),
    "token+tail": (seg(Dense(), TOKEN8), seg(Dense())),
    "token+paged": (seg(Paged(8), TOKEN4, CHANNEL4), seg(Paged(4))),
    "kivi": (seg(Dense(), TOKEN4, CHANNEL4), seg(Budget(36), F64)),
    "prefix+dense": (seg(Dense(), F64, shared=True), seg(Dense())),
    "prefix+ring": (seg(Paged(4), CHANNEL8, shared=True), seg(Ring(6, 1, 12))),
    "prefix+token+tail": (seg(Dense(), TOKEN8, shared=True), seg(Dense(), TOKEN4, CHANNEL8), seg(Dense())),
    "sinks+int8+tail": (seg(Budget(4)), seg(Dense(), CHANNEL8), seg(Budget(36))),
}


def is_ring(type: KV) -> bool:
    return isinstance(type.main[-1].slots, Ring)


def loose(store: KVStore) -> bool:
    """Whether evictions leave the entries in any order: in a cache of one Budget segment."""
    return len(store.type.main) == 1 and isinstance(store.type.main[0].slots, Budget)


def content(pos: torch.Tensor, width: int, salt: int) -> torch.Tensor:
    """Rows ``[n, heads, width]`` that are a function of the position, so that entries can be recognised."""
    x = (
        pos[:, None, None].double() * 0.37
        + torch.arange(HEADS)[:, None] * 1.3
        + torch.arange(width) * 0.71
        + salt
    )
    return torch.sin(x * x)


def append(store: KVStore, tokens: Tokens, salt: torch.Tensor | int = 0) -> None:
    mixed = tokens.pos + 1000 * tokens.row + 77 * torch.as_tensor(salt)
    store.append(tokens, content(mixed, DIM, 0), content(mixed, VDIM, 5))


def make(type: KV, rows: int, poison: float | None = None) -> tuple[KVStore, int]:
    """An empty cache, or with 8 rows in its shared prefix; and the next position."""
    store = KVStore(type, rows, CAPACITY, torch.float64, poison)
    if not type.segments[0].shared:
        return store, 0
    pos = torch.arange(8)
    k, v = content(pos, DIM, 9).transpose(0, 1), content(pos, VDIM, 11).transpose(0, 1)
    store.fill(0, k, v, pos)
    return store, 8


def logical(store: KVStore) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per row and head: positions ``[n]``, keys ``[n, D]`` and values ``[n, Dv]``."""
    n = int(store.lengths().max())
    pos, k, v = store.positions(), store.entries("k", n), store.entries("v", n)
    lists = []
    for b in range(store.rows):
        for h in range(store.type.heads):
            m = int(store.lengths()[b, h])
            lists.append((pos[b, h, :m], k[b, h, :m], v[b, h, :m]))
    return lists


def same_lists(a: KVStore, b: KVStore) -> bool:
    return all(
        x.shape == y.shape and torch.equal(x, y)
        for p, q in zip(logical(a), logical(b), strict=True)
        for x, y in zip(p, q, strict=True)
    )


def queries(tokens: Tokens, salt: torch.Tensor | int = 0) -> torch.Tensor:
    """``[n, 2 heads, D]``, a function of row and position."""
    x = content(tokens.pos + 313 * tokens.row + 29 * torch.as_tensor(salt), DIM, 21)
    return torch.cat((x, -1.7 * x.flip(-1)), 1)


def flush_rows(store: KVStore, rows: list[int]) -> None:
    """Move what the arrangement allows from the tail down: 4 rows of the keys and, a little later, of the
    values."""
    tail = store.tail
    if is_ring(store.type) or tail == 0 or store.type.segments[tail - 1].shared:
        return
    for b in rows:
        if tail == 2 and store.type.segments[0].slots == Budget(4) and not bool(store.len["k"][:2, b].any()):
            if int(store.len["k"][tail, b].min()) >= 4 and int(store.len["v"][tail, b].min()) >= 4:
                store.flush([b], tail, 0, 4)
            continue
        apart = store.type.segments[tail - 1].k != store.type.segments[tail - 1].v
        for what, spare in (("k", 0), ("v", 3)) if apart else (("kv", 0),):
            if all(int(store.len[w][tail, b].min()) >= 4 + spare for w in what):
                store.flush([b], tail, tail - 1, 4, what)


def evict_rows(store: KVStore, rows: list[int]) -> None:
    """Keep about two thirds of the entries, chosen by position (and head), in whole token groups."""
    if is_ring(store.type):
        return
    for b in rows:
        kept = []
        for g in range(len(store.groups)):
            n = int(store.totals()[b, g])
            keep = [(int(p) * 7919 + g * 31) % 3 > 0 for p in store.pos[b, g, :n]]
            for what in "kv":
                start = 0
                for s, segment in enumerate(store.type.main):
                    length = int(store.len[what][s, b, g])
                    group = getattr(segment, what).token_group
                    for i in range(start, start + length):
                        keep[i] = True if segment.shared else keep[i - (i - start) % group]
                    start += length
            kept.append([i for i in range(n) if keep[i]])
        width = max(map(len, kept))
        store.select(torch.tensor([[x + [-1] * (width - len(x)) for x in kept]], dtype=torch.int64), [b])
