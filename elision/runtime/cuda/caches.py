"""Caches in a device's memory: the arrays that `elision.ir.layout` describes, for kernels (`elision.ir.launch`)."""

from __future__ import annotations

from math import prod

import torch

from elision.ir.layout import SLACK, Spec, index_spec, segment_specs, slot_count
from elision.ir.program import Program
from elision.ir.states import KV, Ring
from elision.runtime.cuda.device import Device


class DeviceCache:
    """A cache of a type for ``rows`` sequences of up to ``capacity`` tokens, empty."""

    def __init__(self, device: Device, type: KV, rows: int, capacity: int) -> None:
        self.type, self.rows, self._device = type, rows, device
        arrays: Spec = {}
        for segment, prefix in ((type.main[-1], ""), (type.scratch, "draft_")):
            if segment is not None:
                for what, spec in zip("kv", segment_specs(type, segment, rows, capacity), strict=False):
                    arrays |= {f"{prefix}{what}{'' if n == 'codes' else f'_{n}'}": s for n, s in spec.items()}
        arrays |= index_spec(type, rows, capacity)
        self.specs = arrays
        self.address = {name: device.allocate(prod(shape) * dtype.itemsize + SLACK) for name, (shape, dtype) in arrays.items()}
        tail, slots = type.main[-1].slots, slot_count(type.main[-1].slots, capacity)
        blocks = arrays["k"][0][2]
        self.sizes = {
            "blocks": blocks, "capacity": 16 * blocks, "entries": arrays["pos"][0][2], "slots": slots,
            "turns": slots - tail.sinks if isinstance(tail, Ring) else 0,
            "wide": arrays["score"][0][2] if "score" in arrays else 0,
        }  # fmt: skip

    def read(self, name: str) -> torch.Tensor:
        """An array, copied to the host."""
        shape, dtype = self.specs[name]
        found = torch.empty(shape, dtype=dtype)
        self._device.read(self.address[name], found)
        return found

    def clear(self) -> None:
        """Empty again."""
        for name in ("len_k", "len_v", "count", "node_live", "score", "local"):
            if name in self.specs:
                shape, dtype = self.specs[name]
                self._device.clear(self.address[name], prod(shape) * dtype.itemsize)

    def drop(self) -> None:
        """Nothing that was drafted stays in Scratch."""
        if "node_live" in self.specs:
            self._device.clear(self.address["node_live"], prod(self.specs["node_live"][0]))

    def free(self) -> None:
        for address in self.address.values():
            self._device.free(address)


def caches(device: Device, program: Program, rows: int, capacity: int) -> dict[str, DeviceCache]:
    """The caches of a program, by name."""
    return {n: DeviceCache(device, t, rows, capacity) for n, t in program.states.items() if isinstance(t, KV)}
