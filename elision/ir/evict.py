"""How entries move between the segments of a cache (`flush`), leave it (`select`), and change encoding
(`recode`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from elision.errors import BadInput, IllegalProgram
from elision.ir.states import Budget, Encoding, Ring

if TYPE_CHECKING:
    from elision.ir.store import KVStore

_HELP = {
    "address": "evict from Dense, Budget or Paged segments that this cache owns, or declare keep=per_head",
    "encoding": "move and evict whole token groups, or recode the segment to groups of channels",
}


def flush(store: KVStore, rows: torch.Tensor, frm: int, to: int, n: int, what: str) -> None:
    """`KVStore.flush`."""
    if not 0 <= to < frm <= store.tail or what not in ("k", "v", "kv") or n < 0:
        raise BadInput(
            f"flush({frm} -> {to}, n={n}, {what!r}): expected main segments, {frm} after {to}, and k, v or kv"
        )
    source, target = store.segments[frm], store.segments[to]
    if source.segment.shared or target.segment.shared or isinstance(source.segment.slots, Ring):
        raise _illegal(
            "address", f"flush from {source.segment} to {target.segment}", "one is shared or a Ring"
        )
    for name in what:
        length, a, z = store.len[name], source.planes[name].enc, target.planes[name].enc
        if n % a.token_group or n % z.token_group:
            raise _illegal("encoding", f"flush of {n} rows from {a} to {z}", "it cuts a token group")
        if bool(length[to + 1 : frm, rows].any()) or bool((length[frm, rows] < n).any()):
            raise BadInput(
                f"flush of {n} rows from {frm} to {to}: fewer rows there, or rows in a segment between them"
            )
        if bool((length[to, rows] + n > target.slots).any()):
            raise BadInput(
                f"flush of {n} rows: {target.segment.slots} of {target.slots} rows has no room for them"
            )
    b, oldest = rows[:, None, None], torch.arange(n).expand(len(rows), len(store.groups), n)
    for name in what:
        length = store.len[name]
        end = length[to, rows][..., None] + oldest
        length[to, rows] += n
        store.resize(to)
        if source.planes[name].enc == target.planes[name].enc:
            target.copy(name, source, b, store.heads, oldest, end)
        else:
            target.write(name, b, store.heads, end, source.read(name, b, store.heads, oldest, store.dtype))
        length[frm, rows] -= n
        left = length[frm, rows][..., None]
        slot = torch.arange(int(left.max()) if len(rows) else 0).expand(*left.shape[:2], -1)
        _compact(store, name, frm, rows, slot + n, slot < left)
    store.resize(frm)


def select(store: KVStore, keep: torch.Tensor, rows: torch.Tensor) -> None:
    """`KVStore.select`."""
    groups = len(store.groups)
    if keep.dim() != 3 or len(keep) != len(rows):
        raise BadInput(f"select: keep of shape {list(keep.shape)}; expected [{len(rows)}, 1 or heads, N]")
    if bool((keep == keep[:, :1]).all()):
        keep = keep[:, :1]
    if keep.shape[1] not in (1, groups):
        raise _illegal(
            "address",
            f"select with {keep.shape[1]} sets of entries",
            f"the cache has keep={store.type.keep!r}",
        )
    keep = keep.expand(-1, groups, -1)
    ascending = (keep[..., 1:] < 0) | ((keep[..., :-1] >= 0) & (keep[..., 1:] > keep[..., :-1]))
    if not bool(ascending.all()) or bool((keep >= store.totals()[rows][..., None]).any()):
        raise BadInput("select: expected ascending entries below the cache's length, then -1")
    if _loose(store):
        _fill_gaps(store, keep, rows)
        return
    plans = [(what, s, *_kept(store, what, s, rows, keep)) for what in "kv" for s in range(store.tail + 1)]
    pos = store.pos[rows]
    pos[..., : keep.shape[2]] = torch.where(
        keep >= 0, pos.gather(2, keep.clamp(min=0)), pos[..., : keep.shape[2]]
    )
    store.pos[rows] = pos
    for name in store.type.scores.arrays if store.type.scores is not None else ():
        score = store.index[name]
        moved = keep.expand(-1, store.type.heads, -1).clamp(min=0)
        score[rows, :, : keep.shape[2]] = score[rows].gather(2, moved)
    for what, s, src, valid in plans:
        _compact(store, what, s, rows, src, valid)
        store.len[what][s, rows] = valid.sum(-1)
    for s in range(store.tail + 1):
        if not store.segments[s].segment.shared:
            store.resize(s)


def _loose(store: KVStore) -> bool:
    """Whether the order of the entries means nothing: nothing is flushed from this one segment, and every entry says its
    position."""
    main = store.type.main
    single = len(main) == 1 and max(main[0].k.token_group, main[0].v.token_group) == 1
    return single and isinstance(main[0].slots, Budget) and store.type.keyed_by == "explicit"


def _fill_gaps(store: KVStore, keep: torch.Tensor, rows: torch.Tensor) -> None:
    """Keep ``keep [R, G, N]`` by moving no more entries than are evicted: those beyond the new length take the free slots."""
    left = (keep >= 0).sum(-1, keepdim=True)
    if bool((left == store.totals()[rows][..., None]).all()):
        return
    slot = torch.arange(int(store.totals()[rows].max()) + 1 if len(rows) else 1)  # the last one takes what is -1
    kept = torch.zeros(*keep.shape[:2], len(slot), dtype=torch.bool)
    kept.scatter_(2, torch.where(keep >= 0, keep, len(slot) - 1), True)
    kept[..., -1] = False
    r, g, free = (~kept & (slot < left)).nonzero(as_tuple=True)
    _, _, source = (kept & (slot >= left)).nonzero(as_tuple=True)  # as many for every row and group
    segment, b = store.segments[0], rows[r]
    if len(r):
        h = store.heads if len(store.groups) == 1 else g[:, None, None]
        for what in "kv":
            segment.copy(what, segment, b[:, None, None], h, source[:, None, None], free[:, None, None])
        store.pos[b, g, free] = store.pos[b, g, source]
        for name in store.type.scores.arrays if store.type.scores is not None else ():
            heads = torch.arange(store.type.heads) if len(store.groups) == 1 else g[:, None]
            score = store.index[name]
            score[b[:, None], heads, free[:, None]] = score[b[:, None], heads, source[:, None]]
    for length in store.len.values():
        length[0, rows] = left[..., 0]
    store.resize(0)


def recode(store: KVStore, segment: int, k: Encoding, v: Encoding) -> None:
    """`KVStore.recode`."""
    rows = store.segments[segment]
    if rows.segment.shared:
        raise _illegal("address", f"recode of {rows.segment}", "a shared segment is read-only")
    for name, enc in (("k", k), ("v", v)):
        if bool((store.len[name][segment] % enc.token_group).any()):
            raise _illegal(
                "encoding", f"recode of a segment to {enc}", "its length is not a multiple of the group"
            )
    changed = store.type.with_segment(segment, type(rows.segment)(rows.segment.slots, k, v))
    if segment == store.tail and store.type.scratch is not None:  # drafted rows must look as committed ones
        index = len(store.type.segments) - 1
        changed = changed.with_segment(index, type(rows.segment)(store.type.scratch.slots, k, v))
        store.segments[index].recode(k, v, store.dtype)
    rows.recode(k, v, store.dtype)
    store.type, store.moved = changed, store.moved + 1


def _kept(
    store: KVStore, what: str, s: int, rows: torch.Tensor, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slots of segment s that ``keep [R, G, N]`` keeps, ``[R, G, m]``, and which of these are not
    padding."""
    segment, length = store.segments[s], store.len[what][s, rows][..., None]
    start = store.len[what][:s, rows].sum(0)[..., None]
    inside = (keep >= start) & (keep < start + length)  # one run of the list, because it ascends
    count = inside.sum(-1, keepdim=True)
    i = torch.arange(int(count.max()) if count.numel() else 0)
    first = inside.int().argmax(-1, keepdim=True) if keep.shape[2] else count
    slot = keep.gather(2, (first + i).clamp(max=max(keep.shape[2] - 1, 0))) - start
    valid = i < count
    if (segment.segment.shared or isinstance(segment.segment.slots, Ring)) and bool((count != length).any()):
        raise _illegal(
            "address", f"select drops rows of {segment.segment}", "a shared or Ring segment is kept whole"
        )
    group = segment.planes[what].enc.token_group
    head = slot - i % group  # where the group of this row must begin: at a multiple, and all its rows agree
    cut = valid & ((head % group != 0) | (head != head.gather(2, (i - i % group).expand_as(head))))
    if bool((count % group).any()) or bool(cut.any()):
        raise _illegal(
            "encoding", f"select from rows in token groups of {group}", "it keeps a part of a group"
        )
    return slot, valid


def _compact(
    store: KVStore, what: str, s: int, rows: torch.Tensor, src: torch.Tensor, valid: torch.Tensor
) -> None:
    """Move slot ``src[r, g, i]`` to slot i, in whole token groups, where ``valid [R, G, m]``."""
    segment = store.segments[s]
    group = segment.planes[what].enc.token_group
    src = torch.unflatten(src, 2, (-1, group))
    slots = torch.arange(valid.shape[2]).view(-1, group)
    r, g, i = (torch.unflatten(valid, 2, (-1, group))[..., 0] & (src != slots)[..., 0]).nonzero(as_tuple=True)
    if len(r):
        h = store.heads if len(store.groups) == 1 else g[:, None, None]
        segment.copy(what, segment, rows[r][:, None, None], h, src[r, g, i][:, None], slots[i][:, None])


def _illegal(rule: str, what: str, because: str) -> IllegalProgram:
    return IllegalProgram(rule, what, sides="a state op on this cache", because=because, help=_HELP[rule])
