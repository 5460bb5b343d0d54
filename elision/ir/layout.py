"""The physical layout of cache rows, used by the interpreter, the kernels and every fallback on the same
memory.

A `Plane` holds the keys or the values of one segment. Rows lie in blocks of ``LANES`` = 16 slots. Keys have
the slot as the innermost lane, ``codes [B, H, C/16, W, 16]``, so that one query times sixteen keys is one vector
operation per channel; values have the channel innermost, ``codes [B, H, C/16, 16, W]``. ``W`` is the code
width: D, or D bits/8 bytes for fewer than eight bits. Scales, minima and whatever else an encoding has
(`elision.ir.encoding.sides`) lie beside them in slot order: ``[B, H, C', ...]`` where every slot has its own (C' slots,
C rounded up to whole blocks), ``[B, H, C // n, ...]`` where n slots share one.

The bytes follow from the type: `nbytes` sums the same shapes that `allocate` allocates.
"""

from __future__ import annotations

from math import prod

import torch

from elision.ir.encoding import Packed, Side, check, code_dtype, code_width, decode, encode, sides
from elision.ir.states import (
    KV,
    Array,
    Budget,
    Dense,
    Encoding,
    Float,
    Journal,
    Paged,
    Ring,
    Scores,
    Scratch,
    Segment,
    Slots,
    Summary,
)
from elision.ir.types import DTYPES

LANES = 16

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, dtype


#: Bytes after every array that a vector which begins inside it may read.
SLACK = 64


def allocate(spec: Spec) -> dict[str, torch.Tensor]:
    """Zeros, with `SLACK` behind each array."""
    return {name: _zeros(shape, dtype) for name, (shape, dtype) in spec.items()}


def copied(array: torch.Tensor) -> torch.Tensor:
    """A copy with `SLACK` behind it."""
    return _zeros(tuple(array.shape), array.dtype).copy_(array)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = prod(shape)
    return torch.zeros(count + SLACK // dtype.itemsize, dtype=dtype)[:count].view(shape)


def spec_bytes(spec: Spec) -> int:
    return sum(prod(shape) * dtype.itemsize for shape, dtype in spec.values())


# --- one plane ------------------------------------------------------------------------------------


def plane_spec(enc: Encoding, rows: int, heads: int, capacity: int, dim: int, keys: bool) -> Spec:
    """The arrays of one plane. Raises BadInput when the encoding does not fit the channels."""
    check(enc, dim)
    width, blocks = code_width(enc, dim), -(-capacity // LANES)
    inner = (width, LANES) if keys else (LANES, width)
    spec: Spec = {"codes": ((rows, heads, blocks, *inner), code_dtype(enc))}
    for name, side in sides(enc, dim).items():
        count = blocks * LANES if side.every == 1 else capacity // side.every
        spec[name] = ((rows, heads, count, *side.shape), side.dtype)
    return spec


class Plane:
    """The keys or the values of one segment.

    Places are index tensors ``b`` and ``h`` ``[..., 1]`` (or ``[..., m]``) and ``slots [..., m]``, which
    broadcast; the last axis is a run of slots. In a token-grouped encoding a run consists of whole groups, in
    order.
    """

    def __init__(
        self,
        enc: Encoding,
        rows: int,
        heads: int,
        capacity: int,
        dim: int,
        *,
        keys: bool,
        poison: float | None = None,
    ) -> None:
        self.enc, self.rows, self.heads, self.capacity, self.dim, self.keys = (
            enc,
            rows,
            heads,
            capacity,
            dim,
            keys,
        )
        self.arrays, self.sides = allocate(plane_spec(enc, rows, heads, capacity, dim, keys)), sides(enc, dim)
        self.written: torch.Tensor | None = None  # [B, H, C], only when poisoned
        if poison is not None:
            self.written = torch.zeros(rows, heads, capacity, dtype=torch.bool)
            for array in self.arrays.values():
                array.fill_(poison if array.dtype.is_floating_point else 1)

    def write(self, b: torch.Tensor, h: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Encode ``rows [..., m, D]`` into these slots."""
        self._put(b, h, slots, encode(rows, self.enc))
        if self.written is not None:
            self.written[b, h, slots] = True

    def read(self, b: torch.Tensor, h: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows ``[..., m, D]`` of these slots."""
        return decode(self._get(b, h, slots), self.enc, dtype)

    def read_all(self, n: int, dtype: torch.dtype, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The first ``n`` slots of every row, or of ``rows [m]``: ``[B or m, H, n, D]``, perhaps a view."""
        group = self.enc.token_group
        whole = -(-n // group) * group  # a group that is cut off by n is decoded whole
        blocks = -(-whole // LANES)
        arrays = {name: a if rows is None else a[rows] for name, a in self.arrays.items()}
        codes = arrays["codes"][:, :, :blocks]
        if self.keys:  # one contiguous [W, C] matrix per head, seen transposed
            codes = codes.permute(0, 1, 3, 2, 4).flatten(3).transpose(2, 3)
        else:
            codes = codes.flatten(2, 3)
        if isinstance(self.enc, Float):
            return codes[:, :, :n].to(dtype)
        beside = {name: arrays[name][:, :, : whole // side.every] for name, side in self.sides.items()}
        return decode(Packed(codes[:, :, :whole], beside), self.enc, dtype)[:, :, :n]

    def copy(
        self,
        source: Plane,
        b: torch.Tensor,
        h: torch.Tensor,
        src: torch.Tensor,
        slots: torch.Tensor,
        src_b: torch.Tensor | None = None,
    ) -> None:
        """Move codes unchanged from a plane of the same encoding, or within this one: ``src[i]`` goes to
        ``slots[i]``. ``src_b`` are the source's rows if they are not ``b``."""
        src_b = b if src_b is None else src_b
        packed = source._get(src_b, h, src)
        seen = None if source.written is None else source.written[src_b, h, src]
        self._put(b, h, slots, packed)
        if self.written is not None and seen is not None:
            self.written[b, h, slots] = seen

    def take(self, other: Plane) -> None:
        """Copy as many slots of a plane of the same encoding as this one has, or as there are."""
        pairs = [(a, other.arrays[name]) for name, a in self.arrays.items()]
        if self.written is not None and other.written is not None:
            pairs.append((self.written, other.written))
        for mine, its in pairs:
            n = min(mine.shape[2], its.shape[2])
            mine[:, :, :n] = its[:, :, :n]

    def nbytes(self) -> int:
        """Bytes that are allocated."""
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

    def clone(self) -> Plane:
        new = object.__new__(Plane)
        new.__dict__.update(self.__dict__)
        new.arrays = {name: copied(a) for name, a in self.arrays.items()}
        new.written = None if self.written is None else self.written.clone()
        return new

    def _put(self, b: torch.Tensor, h: torch.Tensor, slots: torch.Tensor, packed: Packed) -> None:
        block, lane = slots // LANES, slots % LANES
        if self.keys:
            self.arrays["codes"][b, h, block, :, lane] = packed.codes
        else:
            self.arrays["codes"][b, h, block, lane] = packed.codes
        for name, side in self.sides.items():
            self.arrays[name][self._place(side, b, h, slots)] = packed.beside[name]

    def _get(self, b: torch.Tensor, h: torch.Tensor, slots: torch.Tensor) -> Packed:
        block, lane = slots // LANES, slots % LANES
        codes = self.arrays["codes"]
        codes = codes[b, h, block, :, lane] if self.keys else codes[b, h, block, lane]
        return Packed(codes, {n: self.arrays[n][self._place(side, b, h, slots)] for n, side in self.sides.items()})

    @staticmethod
    def _place(side: Side, b: torch.Tensor, h: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Where a run of slots has what lies beside its codes."""
        first = [x if x.shape[-1] == 1 else x[..., :: side.every] for x in (b, h)]
        return (*first, slots[..., :: side.every] // side.every)


# --- whole states ---------------------------------------------------------------------------------


def slot_count(slots: Slots, capacity: int, prompt: int | None = 0) -> int:
    """Slots of a segment per row, for a run that asks for ``capacity`` tokens. ``prompt``: how many of them a row has at the
    least before decoding begins; None while they come in."""
    match slots:
        case Ring(window, sinks, chunk):
            return sinks + window + chunk - 1
        case Budget(n, more, open):
            if prompt is None and more:
                return capacity if more < 0 else min(n + more, capacity)
            return min(n + (capacity - (prompt or 0) if open else 0), capacity)
        case Scratch(n):
            return n
        case Dense() | Paged():
            return capacity


def segment_specs(type: KV, segment: Segment, rows: int, capacity: int, prompt: int | None = 0) -> list[Spec]:
    """Keys, values and, if paged, the page table of one segment. A shared segment is stored once for all
    rows."""
    n, plane_rows = slot_count(segment.slots, capacity, prompt), 1 if segment.shared else rows
    tables: list[Spec] = []
    if isinstance(segment.slots, Paged):
        pages = -(-n // segment.slots.page)
        tables = [{"table": ((plane_rows, pages), torch.int64)}]
        n, plane_rows = segment.slots.page, plane_rows * pages
    planes = [(segment.k, type.dim, True), (segment.v, type.vdim, False)]
    return [*(plane_spec(enc, plane_rows, type.heads, n, dim, keys) for enc, dim, keys in planes), *tables]


def index_spec(type: KV, rows: int, capacity: int, prompt: int | None = 0) -> Spec:
    """Positions and lengths, per head only where heads keep different entries; scores (`elision.ir.scores`)."""
    heads = type.heads if type.keep == "per_head" else 1
    entries = sum(slot_count(s.slots, capacity, prompt) for s in type.main)
    lengths = ((len(type.main), rows, heads), torch.int64)
    spec: Spec = {"pos": ((rows, heads, entries), torch.int32), "len_k": lengths, "len_v": lengths}
    if isinstance(type.main[-1].slots, Ring):
        spec["count"] = ((rows,), torch.int64)
    if type.scratch is not None:
        nodes = (rows, slot_count(type.scratch.slots, capacity))
        spec |= {"node_pos": (nodes, torch.int32), "node_live": (nodes, torch.bool)}
    if type.scores is not None:
        spec |= score_spec(type, type.scores, rows, entries)
    if type.summary is not None:
        spec |= summary_spec(type, type.summary, rows, entries)
    return spec


def score_spec(type: KV, scores: Scores, rows: int, entries: int) -> Spec:
    """The score of every entry; of every drafted node that waits for `commit` its logits, by query head, of the entries and of
    the nodes, and what turns them into probabilities: the largest one and the share of its weight. Whole blocks. Of a noisy
    softmax also the tokens of the prompt."""
    wide, nodes = (-(-n // LANES) * LANES for n in (entries, slot_count(type.scratch.slots, 0) if type.scratch else 0))
    spec: Spec = {name: ((rows, type.heads, wide), torch.float32) for name in scores.arrays}
    if scores.depth:
        waiting = (rows, scores.depth, type.heads * scores.group)
        spec |= {
            "waiting": ((*waiting, wide), torch.float32),
            "waiting_nodes": ((*waiting, nodes), torch.float32),
            "waiting_norm": ((*waiting, 2), torch.float32),
        }
    if scores.gumbel is not None:
        spec["prompt"] = ((rows,), torch.int64)
    return spec


def summary_spec(type: KV, summary: Summary, rows: int, entries: int) -> Spec:
    """Of every page that can be complete the largest numbers of the channels of its keys, then the smallest ones, pages in the
    lanes; and how many pages have theirs. A number is as wide as one of the keys (integers: as their scale)."""
    enc = type.main[-1].k
    numbers = enc if isinstance(enc, Float) else Float("f32")
    codes = plane_spec(numbers, rows, type.heads, entries // summary.page, 2 * type.dim, True)["codes"]
    return {"summary": codes, "summarised": ((rows,), torch.int64)}


def row_bytes(type: KV) -> float:
    """Bytes of one entry, key and value over all heads with their scales, in the segment that holds most: the
    first Dense or Paged one, else the one with the most slots."""
    segment = max(type.main, key=lambda s: slot_count(s.slots, 1 << 40))
    n = LANES * segment.k.token_group * segment.v.token_group
    planes = ((segment.k, type.dim, True), (segment.v, type.vdim, False))
    return sum(spec_bytes(plane_spec(enc, 1, type.heads, n, dim, keys)) for enc, dim, keys in planes) / n


def array_spec(type: Array, rows: int) -> Spec:
    """The value and what its undo needs: a copy (Snapshot), or a value per drafted node (Journal)."""
    dtype = DTYPES[type.dtype]
    spec: Spec = {"value": ((rows, *type.shape), dtype)}
    if isinstance(type.undo, Journal):
        spec["pending"] = ((rows, type.undo.depth, *type.shape), dtype)
        spec["live"] = ((rows, type.undo.depth), torch.bool)
    elif type.undo is not None:
        spec |= {"saved": spec["value"], "drafted": ((rows,), torch.int64)}
    return spec


def nbytes(type: KV | Array, rows: int, capacity: int = 0, prompt: int | None = 0) -> int:
    """Bytes of a state over ``rows`` sequences of up to ``capacity`` tokens, from its type alone (``prompt``: `slot_count`)."""
    if isinstance(type, Array):
        return spec_bytes(array_spec(type, rows))
    specs = [s for segment in type.segments for s in segment_specs(type, segment, rows, capacity, prompt)]
    return sum(map(spec_bytes, [*specs, index_spec(type, rows, capacity, prompt)]))
