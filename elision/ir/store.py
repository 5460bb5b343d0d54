"""Run-time storage of a key/value cache, and the semantics of the state ops on it.

The entries of a row (of each head, if heads keep different ones) form one logical list: ``pos``, keys and
values in the same order. The keys of the list are those of segment 0, then of segment 1, ...; so are the
values, with boundaries of their own. A `flush` moves a boundary and leaves the list as it is; a `select`
shortens the list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elision.errors import BadInput
from elision.ir import evict, scores
from elision.ir.array_store import ArrayStore
from elision.ir.layout import allocate, copied, index_spec, slot_count
from elision.ir.nodes import counts_of, nodes_of, path_tokens
from elision.ir.segment import SegmentRows
from elision.ir.states import KV, Budget, Encoding, Ring
from elision.ir.tokens import Tokens

__all__ = ["ArrayStore", "KVStore"]

Rows = torch.Tensor | Sequence[int]


class KVStore:
    """A cache of ``type`` over ``rows`` sequences of up to ``capacity`` tokens; values read back come in
    ``dtype``.

    ``pos [B, G, C]``, ``len["k"]`` and ``len["v"] [S, B, G]`` (rows per main segment) have G = heads if
    ``keep`` is per_head, else 1. With ``poison`` (finite), storage starts filled with it and every read
    checks that what is visible was written. ``prompt``: tokens of the shortest prompt, None while they come in
    (`elision.ir.layout.slot_count`, `settled`).
    """

    def __init__(
        self,
        type: KV,
        rows: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        poison: float | None = None,
        prompt: int | None = None,
    ) -> None:
        if type.storage != "owned":
            raise BadInput(f"KVStore owns its memory; a cache with storage={type.storage!r} is the caller's")
        tail, scratch = type.main[-1], type.scratch
        if scratch is not None and (scratch.k, scratch.v) != (tail.k, tail.v):
            raise BadInput(
                f"Scratch is encoded as {scratch.k}/{scratch.v}; expected as the tail, {tail.k}/{tail.v}"
            )
        self.type, self.rows, self.capacity, self.dtype, self.poison = type, rows, capacity, dtype, poison
        self.segments = [SegmentRows(type, s, rows, capacity, poison, prompt) for s in type.segments]
        self.index = allocate(index_spec(type, rows, capacity, prompt))
        self.pos = self.index["pos"]
        self.len = {"k": self.index["len_k"], "v": self.index["len_v"]}
        self.moved = 0  # times that its memory was replaced
        self.heads = torch.arange(type.heads)[:, None]
        self.groups = torch.arange(self.pos.shape[1])

    # --- reading ---

    @property
    def tail(self) -> int:
        """The main segment that rows are appended to."""
        return len(self.type.main) - 1

    def totals(self) -> torch.Tensor:
        """Entries of the logical list, ``[B, G]``."""
        return self.len["k"].sum(0)

    def lengths(self) -> torch.Tensor:
        """Entries per row and head, ``[B, H]``."""
        return self.totals().expand(self.rows, self.type.heads)

    def positions(self) -> torch.Tensor:
        """The position of each entry of the logical list, ``[B, H, C]`` int64, -1 where there is none."""
        there = torch.arange(self.pos.shape[2]) < self.totals()[..., None]
        return torch.where(there, self.pos.long(), -1).expand(-1, self.type.heads, -1)

    def entries(self, what: str, n: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The keys (``"k"``) or values (``"v"``) of the first ``n`` entries, ``[B, H, n, D]``; arbitrary
        beyond a list's end."""
        dtype, lengths = dtype or self.dtype, self.len[what]
        if len(lengths) == 1:
            return self.segments[0].read_all(what, n, dtype)
        most = lengths.flatten(1).amax(1).tolist()
        used = [s for s in range(len(lengths)) if most[s]]
        parts = [self.segments[s].read_all(what, most[s], dtype) for s in used]
        if all(bool((lengths[s] == most[s]).all()) for s in used[:-1]):
            return torch.cat(parts, 2) if parts else self.segments[0].read_all(what, 0, dtype)
        entry, place, offset = torch.arange(n), torch.zeros(n, dtype=torch.int64), 0
        start = torch.zeros_like(lengths[0])
        for s in used:  # ragged boundaries: where each list finds its entries in the parts
            slot = entry - start[..., None]
            inside = (slot >= 0) & (slot < lengths[s][..., None])
            place = torch.where(inside, slot + offset, place)
            start, offset = start + lengths[s], offset + most[s]
        joined = torch.cat(parts, 2)
        wide = place.expand(self.rows, self.type.heads, n)[..., None].expand(-1, -1, -1, joined.shape[-1])
        return joined.gather(2, wide)

    def drafted(self, what: str, n: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The keys or values of the first ``n`` nodes in Scratch, ``[B, H, n, D]``."""
        return self.segments[-1].read_all(what, n, dtype or self.dtype)

    def ring_from(self) -> torch.Tensor | None:
        """The first entry ``[B, G]`` of the Ring, whose entries go out of sight with distance; None if there
        is none."""
        return self.len["k"][:-1].sum(0) if isinstance(self.type.main[-1].slots, Ring) else None

    @property
    def written(self) -> torch.Tensor | None:
        """For each entry ``[B, H, C]``, whether its key and value were written; None without poison."""
        if self.poison is None:
            return None
        found = torch.ones(self.rows, self.type.heads, self.pos.shape[2], dtype=torch.bool)
        b = torch.arange(self.rows)[:, None, None]
        for what, lengths in self.len.items():
            start = torch.zeros_like(lengths[0])
            for segment, length in zip(self.segments, lengths, strict=False):
                slot = torch.arange(self.pos.shape[2]) - start[..., None]
                inside = (slot >= 0) & (slot < length[..., None])
                at, slot = segment.at(b, slot.clamp(0, max(segment.slots - 1, 0)))
                bits = segment.planes[what].written
                assert bits is not None
                found &= torch.where(inside, bits[at, self.heads, slot], True)
                start = start + length
        return found & (torch.arange(self.pos.shape[2]) < self.totals()[..., None])

    def need_room(self, counts: torch.Tensor) -> None:
        """Raises BadInput if the sequences cannot take ``counts [B]`` more entries (what appends natively has no check of its
        own)."""
        slots, tail = self.type.main[-1].slots, self.tail
        room = self.segments[tail].slots
        if isinstance(slots, Budget) and int((self.len["k"][tail].amax(1) + counts).max()) > room:
            raise BadInput(f"append: {slots} has {room} rows and they are full; evict on the clock, or ask for more")

    def bytes(self) -> int:
        """Bytes that are allocated."""
        index = sum(a.numel() * a.element_size() for a in self.index.values())
        return index + sum(s.nbytes() for s in self.segments)

    # --- append, commit ---

    def append(self, tokens: Tokens, k: torch.Tensor, v: torch.Tensor) -> None:
        """Add ``k [n, H, D]`` and ``v [n, H, Dv]``: committed tokens to the tail, drafted ones to Scratch at
        their node. Raises BadInput when they do not fit."""
        if tokens.drafted:
            self._append_draft(tokens, k, v)
            return
        rank, counts = counts_of(tokens)
        slots = self.type.main[-1].slots
        if isinstance(slots, Ring) and int(counts.max()) > slots.chunk:
            raise BadInput(
                f"append of {int(counts.max())} tokens to {slots}; append at most {slots.chunk} at a time"
            )
        _, places = self._advance(tokens, rank, counts)
        b, tail = tokens.row[:, None, None], self.segments[self.tail]
        for what, x in (("k", k), ("v", v)):
            tail.write(what, b, self.heads, places[what], x[:, :, None])

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Append the accepted nodes of each row (``paths[b]``, from the root on) and clear Scratch. Codes are
        moved unchanged, so the result is that of having appended them. Where positions may be absent, nodes that
        passed by are not appended."""
        if self.type.present.partial:
            live = self.index["node_live"]
            paths = [[i for i in p if live[r, i]] for r, p in enumerate(paths)]
        tokens, node = path_tokens(paths, self._node_pos(), self.index["node_live"])
        if len(tokens):
            before = self.totals().clone()
            kept, places = self._advance(tokens, *counts_of(tokens))
            b, node = tokens.row[kept][:, None, None], node[kept][:, None, None]
            tail, scratch = self.segments[self.tail], self.segments[-1]
            for what in ("k", "v"):
                tail.copy(what, scratch, b, self.heads, node, places[what][kept])
            if self.type.scores is not None:
                scores.credit(self, paths, before)
        self.index["node_live"].zero_()

    def drop(self) -> None:
        """Clear Scratch: nothing that was drafted joins."""
        self.index["node_live"].zero_()

    def _node_pos(self) -> torch.Tensor:
        if self.type.scratch is None:
            raise BadInput(
                "this cache has no Scratch segment, so nothing can be drafted; add Segment(Scratch(n)) last"
            )
        return self.index["node_pos"]

    def _append_draft(self, tokens: Tokens, k: torch.Tensor, v: torch.Tensor) -> None:
        node_pos, node = self._node_pos(), nodes_of(tokens)
        if len(tokens) and int(node.max()) >= node_pos.shape[1]:
            raise BadInput(
                f"drafted node {int(node.max())}, but Scratch holds {node_pos.shape[1]}; draft fewer tokens"
            )
        node_pos[tokens.row, node] = tokens.pos.to(node_pos.dtype)
        self.index["node_live"][tokens.row, node] = True
        b, scratch = tokens.row[:, None, None], self.segments[-1]
        for what, x in (("k", k), ("v", v)):
            scratch.write(what, b, self.heads, node[:, None, None], x[:, :, None])

    def _advance(
        self, tokens: Tokens, rank: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor | slice, dict[str, torch.Tensor]]:
        """Count these tokens in: which of them remain, and the tail slots ``[n, G, 1]`` of their keys and
        values."""
        t, row, rank = self.tail, tokens.row, rank[:, None]
        tail = self.segments[t]
        slots = tail.segment.slots
        kept: torch.Tensor | slice = slice(None)
        if isinstance(slots, Ring):
            turns, number = tail.slots - slots.sinks, self.index["count"][row][:, None] + rank
            place = torch.where(number < slots.sinks, number, slots.sinks + (number - slots.sinks) % turns)
            kept = ((number < slots.sinks) | (rank >= counts[row][:, None] - turns))[:, 0]
            self.index["count"] += counts
            before = self.len["k"][:-1].sum(0)
            lengths = self.index["count"].clamp(max=tail.slots)[:, None]
            self.len["k"][t], self.len["v"][t] = lengths, lengths
            entry, places = before[row] + place, dict.fromkeys("kv", place[..., None])
        else:
            places = {what: (self.len[what][t][row] + rank)[..., None] for what in "kv"}
            if len(row) and max(int(places["k"].max()), int(places["v"].max())) >= tail.slots:
                raise BadInput(
                    f"append: {slots} has {tail.slots} rows and they are full; evict, flush or ask for more"
                )
            entry = self.totals()[row] + rank
            for length in self.len.values():
                length[t] += counts[:, None]
            self.resize(t)
        self.pos[row[kept, None], self.groups, entry[kept]] = tokens.pos[kept, None].to(self.pos.dtype)
        scores.begin(self, row[kept], entry[kept])
        return kept, places

    def resize(self, segment: int) -> None:
        """Take and give back pages of a segment as its lengths say; what lies beyond them counts as
        unwritten."""
        rows = self.segments[segment]
        if rows.page:
            rows.reserve(torch.maximum(self.len["k"][segment], self.len["v"][segment]).amax(1))
        elif self.poison is not None and not rows.segment.shared:
            for what, plane in rows.planes.items():
                assert plane.written is not None
                plane.written &= torch.arange(rows.slots) < self.len[what][segment][..., None]

    # --- moving, evicting, recoding ---

    def fill(self, segment: int, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor) -> None:
        """Give a shared segment its content, once, before anything is appended: ``k [H, m, D]``, ``v [H, m,
        Dv]``, ``pos [m]``."""
        n, s = len(pos), self.segments[segment]
        if not s.segment.shared or bool(self.len["k"][segment:].any()) or n > s.slots:
            raise BadInput(
                f"fill({segment}): expected an empty shared segment for {n} rows, with nothing after it"
            )
        self.segments[segment] = s = SegmentRows(self.type, s.segment, self.rows, self.capacity, self.poison)
        self.pos[:, :, (start := int(self.totals().max())) : start + n] = pos.to(self.pos.dtype)
        for lengths in self.len.values():
            lengths[segment] = n
        s.reserve(torch.tensor([n]))
        b = torch.zeros(1, 1, 1, dtype=torch.int64)
        for what, x in (("k", k), ("v", v)):
            s.write(what, b, self.heads, torch.arange(n), x[None])

    def flush(self, rows: Rows, frm: int, to: int, n: int, what: str = "kv", keep: int = -1) -> None:
        """Move the oldest ``n`` keys and values (or only ``"k"`` or ``"v"``) of segment ``frm`` to the end of
        ``to``, in its encoding, for some rows: once, or with ``keep`` >= 0 as often as each row keeps at least so many.
        ``to`` is before ``frm``, and what lies between is empty. Raises IllegalProgram when token groups would be cut (rule
        encoding) or a Ring or shared segment would change (rule address)."""
        if keep < 0:
            evict.flush(self, _rows(rows), frm, to, n, what)
            return
        for name in what:
            times = (self.len[name][frm, _rows(rows)].amin(1) - keep).clamp(min=0) // n
            for count in sorted(set(times.tolist())):
                evict.flush(self, _rows(rows)[times == count], frm, to, n * count, name)

    def select(self, keep: torch.Tensor, rows: Rows | None = None) -> None:
        """Keep exactly the entries ``keep [R, 1 or H, N]`` of some rows (all by default): ascending indices
        into the logical list, then -1. They stay in order, but in a cache of one Budget segment the last ones fill
        the gaps. Raises IllegalProgram as `flush` does, and (rule address) for sets per head without
        keep=per_head."""
        evict.select(self, keep, torch.arange(self.rows) if rows is None else _rows(rows))

    def recode(self, segment: int, k: Encoding, v: Encoding) -> None:
        """Store a segment in another encoding; ``type`` changes with it, and Scratch changes with the tail.
        Raises IllegalProgram (rule encoding) when a token group would be incomplete."""
        evict.recode(self, segment, k, v)

    def settled(self, prompt: int) -> KVStore:
        """The cache as it is while decoding goes on after prompts of at least ``prompt`` tokens: a copy in less memory, or
        itself if it needs no less. Raises BadInput when its entries do not fit."""
        type, capacity = self.type, self.capacity
        if all(slot_count(s.slots, capacity, prompt) == r.slots for s, r in zip(type.main, self.segments, strict=False)):
            return self
        new = KVStore(type, self.rows, capacity, self.dtype, self.poison, prompt)
        for i, (old, segment, length) in enumerate(zip(self.segments, new.segments, self.len["k"], strict=False)):
            if old.slots == segment.slots and not old.segment.shared:
                new.segments[i] = old.clone()
                continue
            if int(length.max()) > segment.slots:
                raise BadInput(f"{int(length.max())} entries after the prompt, but {segment.segment.slots} holds {segment.slots}")
            for name, plane in segment.planes.items():
                plane.take(old.planes[name])
        for name, array in new.index.items():
            source = self.index[name]
            array.copy_(source[tuple(slice(n) for n in array.shape)])
        return new

    def fork(self) -> KVStore:
        """An independent copy, with the same memory for shared segments."""
        new = object.__new__(KVStore)
        new.__dict__.update(self.__dict__)
        new.index = {name: copied(a) for name, a in self.index.items()}
        new.pos, new.len = new.index["pos"], {"k": new.index["len_k"], "v": new.index["len_v"]}
        new.segments = [s.clone() for s in self.segments]
        return new


def _rows(rows: Rows) -> torch.Tensor:
    return torch.as_tensor(rows, dtype=torch.int64)
