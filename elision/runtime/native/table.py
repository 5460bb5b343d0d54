"""A schedule with addresses: the table that native code walks, and the memory of its buffers."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from elision.ir import schedule as abi
from elision.ir.types import DTYPES


class Table:
    """The rows of one entry for calls of up to ``capacity[a]`` tokens on axis a, with ``threads`` threads."""

    def __init__(
        self,
        schedule: abi.Schedule,
        capacity: Sequence[int],
        threads: int,
        kernel: Callable[[str], int],
        weight: Callable[[str], int],
    ) -> None:
        self.schedule, self.capacity, self.threads = schedule, tuple(capacity), threads
        self._memory: dict[int, tuple[torch.Tensor, int, int]] = {}  # slot: bytes, address, bytes per thread
        self._wholes: dict[tuple[int, str], torch.Tensor] = {}  # the memory of a slot as numbers of a dtype
        for buffer in schedule.buffers:
            if buffer.slot >= 0 and buffer.slot not in self._memory:
                self._memory[buffer.slot] = self._allocate(buffer)
        self._states = {name: i for i, name in enumerate(schedule.states)}
        self.words = np.zeros((len(schedule.rows) + 1, abi.WORDS), np.int64)
        for i, row in enumerate(schedule.rows):
            if row.host < 0:
                self.words[i, abi.KERNEL] = kernel(row.kernel)
                self.words[i, abi.FLAGS] = abi.BARRIER if row.barrier else 0
                operands = [w for o in row.operands for w in self._words(o, weight)]
                self.words[i, abi.OPERANDS : abi.OPERANDS + len(operands)] = operands

    def _allocate(self, buffer: abi.Buffer) -> tuple[torch.Tensor, int, int]:
        tokens = self.capacity[buffer.axis] if buffer.axis >= 0 else 1
        size = -(-buffer.width * tokens // 64) * 64 + 64  # a vector may be read past the end
        data = torch.empty(size * (self.threads if buffer.private else 1) + 64, dtype=torch.uint8)
        return data, -(-data.data_ptr() // 64) * 64, size if buffer.private else 0

    def _words(self, operand: tuple[Any, ...], weight: Callable[[str], int]) -> list[int]:
        match operand:
            case ("tensor", str(name), *_):
                return [weight(name), 0, 0]
            case ("tensor", int(buffer), int(offset), int(itemsize)):
                b = self.schedule.buffers[buffer]
                _, address, apart = self._memory[b.slot]
                return [address + offset, apart, b.width // itemsize]
            case ("weight", str(name)):
                return [weight(name)]
            case ("state", str(name)):
                return [self._states[name]]
            case ("axis", int(axis)):
                return [abi.AXES + abi.AXIS_WORDS * axis]
            case ("int", int(n)):
                return [n]
            case ("float", float(x)):
                return [struct.unpack("<i", struct.pack("<f", x))[0] & 0xFFFFFFFF]
        raise AssertionError(f"unknown operand {operand}")

    def view(self, place: tuple[Any, ...], count: int) -> torch.Tensor:
        """The tensor ``[count, ..]`` at ``("view", buffer, offset, strides, shape, dtype, axis)``."""
        _, buffer, offset, strides, shape, dtype, _ = place
        b, kind = self.schedule.buffers[buffer], DTYPES[dtype]
        whole = self._wholes.get((b.slot, dtype))
        if whole is None:
            data, address, _ = self._memory[b.slot]
            base = data[address - data.data_ptr() :]
            with torch.inference_mode(False):  # it is kept for calls outside of that mode, too
                whole = self._wholes[b.slot, dtype] = base[: (len(base) // 8) * 8].view(kind)
        return whole.as_strided((count, *shape), (b.width // kind.itemsize, *strides), offset)

    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return sum(data.numel() for data, _, _ in self._memory.values())
