"""Caches in a device's memory: the arrays that `elision.ir.layout` describes, for kernels (`elision.ir.launch`)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from elision.errors import BadInput
from elision.ir.layout import SLACK, Spec, index_spec, segment_specs, slot_count
from elision.ir.program import Program
from elision.ir.states import KV, Ring
from elision.runtime.cuda.device import Device, free_all


class DeviceCache:
    """A cache of a type for ``rows`` sequences of up to ``capacity`` tokens, empty. Its memory goes when nothing refers to it.

    ``prompt``: tokens of the shortest prompt, None while they come in (`elision.ir.layout.slot_count`, `settled`).
    """

    def __init__(self, device: Device, type: KV, rows: int, capacity: int, prompt: int | None = 0) -> None:
        self.type, self.rows, self.capacity, self._device = type, rows, capacity, device
        arrays: Spec = {}
        older = type.main[0] if len(type.main) > 1 else None
        for segment, prefix in ((type.main[-1], ""), (type.scratch, "draft_"), (older, "older_")):
            if segment is not None:
                for what, spec in zip("kv", segment_specs(type, segment, rows, capacity, prompt), strict=False):
                    arrays |= {f"{prefix}{what}{'' if n == 'codes' else f'_{n}'}": s for n, s in spec.items()}
        arrays |= index_spec(type, rows, capacity, prompt)
        self.specs = arrays
        self._whole = {name: device.allocate(prod(shape) * dtype.itemsize + SLACK) for name, (shape, dtype) in arrays.items()}
        self.address = dict(self._whole)  # lengths: those of the segment that is appended to
        if older is not None:
            for name in ("len_k", "len_v"):
                self.address |= {f"older_{name}": self._whole[name], name: self._whole[name] + 8 * prod(arrays[name][0][1:])}
        tail, slots = type.main[-1].slots, slot_count(type.main[-1].slots, capacity, prompt)
        blocks = arrays["k"][0][2]
        self.sizes = {
            "blocks": blocks, "capacity": 16 * blocks, "entries": arrays["pos"][0][2], "slots": slots,
            "turns": slots - tail.sinks if isinstance(tail, Ring) else 0,
            "wide": arrays["score"][0][2] if "score" in arrays else 0,
            "pages": 16 * arrays["summary"][0][2] if "summary" in arrays else 0,
            "older_blocks": arrays["older_k"][0][2] if older is not None else 0,
            "older_groups": arrays["older_k_scale"][0][2] if older is not None else 0,
        }  # fmt: skip
        self._most = np.zeros(rows, np.int64)  # entries of a sequence there, at the most
        self.free = weakref.finalize(self, free_all, device, tuple(self._whole.values()))
        self.free.atexit = False  # the device may be gone by then

    def need_room(self, counts: np.ndarray[Any, Any]) -> None:
        """So many entries will join the sequences. Raises BadInput if they do not fit, since kernels do not ask."""
        slots = self.type.main[-1].slots
        most = self._most + counts
        if not isinstance(slots, Ring) and int(most.max()) > self.sizes["slots"]:
            raise BadInput(f"append: {slots} has {self.sizes['slots']} rows and they are full; evict, or ask for more")
        self._most = most

    def unused(self, counts: np.ndarray[Any, Any]) -> None:
        """So many of the entries for which there was room have not come."""
        self._most = self._most - counts

    def evicted(self, rows: np.ndarray[Any, Any], n: int) -> None:
        """At most ``n`` entries of these sequences have stayed."""
        self._most[rows] = np.minimum(self._most[rows], n)

    def flushed(self, rows: np.ndarray[Any, Any], n: int, keep: int) -> None:
        """Whole blocks of ``n`` entries beyond the last ``keep`` have gone to the segment before. Nothing evicts from such a
        cache, so its counts are exact."""
        self._most[rows] -= np.maximum(self._most[rows] - keep, 0) // n * n

    def bytes(self) -> int:
        """Bytes that are allocated."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.specs.values())

    def settled(self, prompt: int) -> DeviceCache:
        """The cache as it is while decoding goes on (`KVStore.settled`): a copy in less memory, or itself."""
        new = DeviceCache(self._device, self.type, self.rows, self.capacity, prompt)
        if new.specs == self.specs:
            return self
        if int(self._most.max()) > new.sizes["slots"]:
            raise BadInput(f"{int(self._most.max())} entries after the prompt, but there is room for {new.sizes['slots']}")
        for name, (shape, dtype) in new.specs.items():
            times, nbytes, *pitch = _common(shape, self.specs[name][0], dtype.itemsize)
            self._device.copy(new._whole[name], self._whole[name], times, nbytes, *pitch)
        new._most = self._most
        return new

    def read(self, name: str) -> torch.Tensor:
        """An array, copied to the host."""
        shape, dtype = self.specs[name]
        found = torch.empty(shape, dtype=dtype)
        self._device.read(self._whole[name], found)
        return found

    def drop(self) -> None:
        """Nothing that was drafted stays in Scratch."""
        if "node_live" in self.specs:
            self._device.clear(self.address["node_live"], prod(self.specs["node_live"][0]))


def _common(a: Sequence[int], b: Sequence[int], itemsize: int) -> tuple[int, int, int, int]:
    """Of two arrays that differ in one axis at the most, what both have: how many runs, their bytes, and how many bytes they are
    apart in the first and in the second."""
    axis = next((i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n), 0)
    inner = prod(a[axis + 1 :]) * itemsize
    return prod(a[:axis]), min(a[axis], b[axis]) * inner, a[axis] * inner, b[axis] * inner


def caches(device: Device, program: Program, rows: int, capacity: int) -> dict[str, DeviceCache]:
    """The caches of a program, by name."""
    return {n: DeviceCache(device, t, rows, capacity) for n, t in program.states.items() if isinstance(t, KV)}
