"""The rows of one cache segment: a plane of keys, a plane of values, and the pages that they lie in, if
any."""

from __future__ import annotations

import torch

from elision.errors import BadInput
from elision.ir.layout import Plane, allocate, segment_specs, slot_count
from elision.ir.states import KV, Encoding, Paged, Segment


class SegmentRows:
    """Slots ``0 .. slots - 1`` of each row b. Slot s of a paged segment lies in page ``table[b, s // page]``,
    taken from the pool by `reserve`; a shared segment lies once for all rows."""

    def __init__(
        self, type: KV, segment: Segment, rows: int, capacity: int, poison: float | None, prompt: int | None = 0
    ) -> None:
        self.segment, self.rows, self.slots = segment, rows, slot_count(segment.slots, capacity, prompt)
        self.heads = torch.arange(type.heads)
        page = segment.slots.page if isinstance(segment.slots, Paged) else 0
        specs = segment_specs(type, segment, rows, capacity, prompt)
        self.planes: dict[str, Plane] = {}
        for name, enc, dim, spec in (
            ("k", segment.k, type.dim, specs[0]),
            ("v", segment.v, type.vdim, specs[1]),
        ):
            if page % enc.token_group:
                raise BadInput(f"{segment}: pages of {page} rows cut token groups of {enc.token_group}")
            plane_rows = spec["codes"][0][0]
            self.planes[name] = Plane(
                enc, plane_rows, type.heads, page or self.slots, dim, keys=name == "k", poison=poison
            )
        self.page = page
        self.table = allocate(specs[2])["table"].fill_(-1) if page else None
        self.held = [0] * rows
        self.free = list(range(self.planes["k"].rows))[::-1] if page else []

    def at(self, b: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The plane's rows and slots of these rows ``b [..., 1]`` and slots ``[..., m]``."""
        b = torch.zeros_like(b) if self.segment.shared else b
        if self.table is not None:
            return self.table[b, slots // self.page], slots % self.page
        return b, slots

    def write(
        self, what: str, b: torch.Tensor, h: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Encode ``rows [..., m, D]`` into these slots (`Plane.write`)."""
        at, slots = self.at(b, slots)
        self.planes[what].write(at, h, slots, rows)

    def read(
        self, what: str, b: torch.Tensor, h: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        at, slots = self.at(b, slots)
        return self.planes[what].read(at, h, slots, dtype)

    def read_all(self, what: str, n: int, dtype: torch.dtype) -> torch.Tensor:
        """The first ``n`` slots: ``[B, H, n, D]``, perhaps a view; beyond a row's length the content is
        arbitrary."""
        plane = self.planes[what]
        if self.table is not None:
            pages = self.table[:, : -(-n // self.page)].clamp(min=0)
            found = plane.read_all(self.page, dtype, pages.flatten())
            found = torch.unflatten(found, 0, pages.shape).transpose(1, 2).flatten(2, 3)[:, :, :n]
        else:
            found = plane.read_all(n, dtype)
        return found.expand(self.rows, -1, -1, -1)

    def copy(
        self,
        what: str,
        source: SegmentRows,
        b: torch.Tensor,
        h: torch.Tensor,
        src: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Move codes unchanged: slot ``src[i]`` of ``source`` goes to ``slots[i]`` here."""
        src_b, src = source.at(b, src)
        at, slots = self.at(b, slots)
        self.planes[what].copy(source.planes[what], at, h, src, slots, src_b)

    def reserve(self, lengths: torch.Tensor) -> None:
        """Take pages so that row b has slots ``0 .. lengths[b] - 1``; give back those beyond. ``lengths
        [B]``."""
        if self.table is None:
            return
        for b, length in enumerate(lengths.tolist()):
            need = -(-length // self.page)
            while self.held[b] < need:
                self.table[b, self.held[b]] = self.free.pop()
                self.held[b] += 1
            while self.held[b] > need:
                self.held[b] -= 1
                page = int(self.table[b, self.held[b]])
                self.free.append(page)
                self.table[b, self.held[b]] = -1
                for plane in self.planes.values():
                    if plane.written is not None:
                        plane.written[page] = False

    def recode(self, k: Encoding, v: Encoding, dtype: torch.dtype) -> None:
        """Store every row in another encoding, in new planes."""
        segment = Segment(self.segment.slots, k, v, self.segment.shared)
        for name, enc in (("k", k), ("v", v)):
            old = self.planes[name]
            if self.page % enc.token_group:
                raise BadInput(f"{segment}: pages of {self.page} rows cut token groups of {enc.token_group}")
            new = Plane(enc, old.rows, old.heads, old.capacity, old.dim, keys=old.keys)
            n = old.capacity // enc.token_group * enc.token_group
            if n:
                b, h = torch.arange(old.rows)[:, None, None], self.heads[:, None]
                new.write(b, h, torch.arange(n), old.read_all(old.capacity, dtype)[:, :, :n])
            new.written = old.written
            self.planes[name] = new
        self.segment = segment

    def nbytes(self) -> int:
        """Bytes that are allocated."""
        table = 0 if self.table is None else self.table.numel() * self.table.element_size()
        return sum(plane.nbytes() for plane in self.planes.values()) + table

    def clone(self) -> SegmentRows:
        """A copy; the planes of a shared segment, which are read-only, are the same ones."""
        new = object.__new__(SegmentRows)
        new.__dict__.update(self.__dict__)
        if not self.segment.shared:
            new.planes = {name: plane.clone() for name, plane in self.planes.items()}
        new.table = None if self.table is None else self.table.clone()
        new.held, new.free = list(self.held), list(self.free)
        return new
