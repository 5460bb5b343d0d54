"""Entries on a GPU: weights go there once, a call's tokens and launches each time; nothing is asked of the device in between."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from elision.ir.flatten import generating_entries
from elision.ir.launch import DeviceCode, need_kernels, shape_of
from elision.ir.nodes import nodes_of
from elision.ir.op import lookup
from elision.ir.planes import plane_form, planes
from elision.ir.program import Program
from elision.ir.schedule import Row, Schedule
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES
from elision.runtime.cuda.caches import DeviceCache
from elision.runtime.cuda.device import Device, Number

Caches = Mapping[str, DeviceCache]


class Call:
    """An entry for a class of shapes, with memory for the tokens that it was made for; kept, so that graphs stay valid."""

    def __init__(self, engine: Engine, schedule: Schedule, room: int, rows: int) -> None:
        self.schedule, self.room, self.rows, self.device = schedule, room, rows, engine.device
        slots: dict[int, int] = {}
        for buffer in schedule.buffers:
            if buffer.slot >= 0:
                slots[buffer.slot] = max(slots.get(buffer.slot, 0), buffer.width)
        self.slots = {slot: self.device.allocate(max(256, width * room)) for slot, width in slots.items()}
        self.axes: dict[tuple[int, str], int] = {}
        self.counts: dict[int, int] = {}
        self.longest: dict[int, int] = {}
        self.feeds = all(row.host < 0 for row in schedule.rows)  # nothing of the host's depends on positions
        self.fed: tuple[Any, ...] = ()  # which tokens, of which caches, are on the device already (`Natives`)
        self.graphs: weakref.WeakKeyDictionary[DeviceCache, dict[Any, Callable[[], None]]] = weakref.WeakKeyDictionary()

    def buffer(self, index: int) -> int:
        slot = self.schedule.buffers[index].slot
        return self.slots[slot] if slot >= 0 else 0

    def set_axis(self, index: int, at: Tokens, chosen: torch.Tensor | None = None) -> None:
        """Put an axis's arrays where kernels find them."""
        start = torch.searchsorted(at.row, torch.arange(self.rows + 1))
        arrays = {"row": at.row, "pos": at.pos, "start": start}
        if at.anc is not None and at.parent is not None:
            arrays |= {"anc": at.anc, "node": nodes_of(at), "parent": at.parent}
        else:
            end = start[at.row + 1]
            arrays["ahead"] = end - 1 - torch.arange(len(at)) if at.ahead is None else at.ahead
        if chosen is not None:
            arrays["index"] = chosen
        for name, array in arrays.items():
            if (index, name) not in self.axes:
                self.axes[index, name] = self.device.allocate(8 * (max(self.room, self.rows) + 1))
            self.device.write(self.axes[index, name], array.long().contiguous())
        self.counts[index] = len(at)
        self.longest[index] = int((start[1:] - start[:-1]).max()) if len(at) else 0

    def free(self) -> None:
        self.device.wait()  # launches may still read it
        for address in (*self.slots.values(), *self.axes.values()):
            self.device.free(address)


class Engine:
    """The entries of a program on a device. Raises BadInput for a program with ops that have no kernel."""

    def __init__(self, program: Program, code: DeviceCode, weights: Mapping[str, torch.Tensor], device: Device) -> None:
        need_kernels(program.name, code)
        self.program, self.code, self.device, self._weights = program, code, device, weights
        self.graphs = generating_entries(program)
        self._addresses: dict[tuple[str, int], int] = {}
        self._calls: dict[tuple[str, str], Call] = {}
        self._round: dict[tuple[str, int, int], int] = {}
        self._most = 0

    def call(self, entry: str, at: Tokens, ids: torch.Tensor | None) -> Call:
        """Memory for a call of an entry with these tokens, which are put there."""
        schedules = self.code.schedules[entry]
        shape = shape_of(len(at), schedules)
        found = self._calls.get((entry, shape))
        if found is None or found.room < len(at) or found.rows != at.rows:
            if found is not None:
                found.free()
            room = max(len(at), {"one": 1, "few": 16, "some": 64}.get(shape, 1))
            found = self._calls[entry, shape] = Call(self, schedules[shape], room, at.rows)
        found.fed = ()
        found.set_axis(0, at)
        if ids is not None:
            self.device.write(found.buffer(found.schedule.inputs[0]), ids.long().contiguous())
        for row in found.schedule.rows:
            if row.host >= 0:
                self._tokens(found, entry, row, at)
        return found

    def known(self, entry: str, at: Tokens) -> Call | None:
        """What `call` made for so many tokens before, as it was left."""
        return self._calls.get((entry, shape_of(len(at), self.code.schedules[entry])))

    def _tokens(self, call: Call, entry: str, row: Row, at: Tokens) -> None:
        """What follows from which tokens there are is computed here, before the first launch."""
        value = self.graphs[entry].values[row.host]
        op, (_, results) = lookup(value.op), row.operands[1]
        found: Any = op.body(torch.empty(len(at), 0), **dict(value.attrs), at=at)
        if op.makes_axis:
            found, tokens = found
            call.set_axis(results[0][6], tokens, found)
        if results[0][0] == "view" and call.buffer(results[0][1]):
            self.device.write(call.buffer(results[0][1]), found.contiguous())

    def run(self, call: Call, caches: Caches) -> None:
        """The launches of a call, in order."""
        for launch in self._launches(call, caches):
            self.device.launch(*launch)

    def graph(self, call: Call, caches: Caches) -> Callable[[], None]:
        """The launches of a call as a graph. What they need is there before they are recorded."""
        launches = self._launches(call, caches)

        def all_of_them() -> None:
            for launch in launches:
                self.device.launch(*launch)

        return self.device.record(all_of_them)

    def _launches(self, call: Call, caches: Caches) -> list[tuple[str, list[int], list[Number]]]:
        """Kernels, grids and arguments, but for launches of no program."""
        found = []
        for row in call.schedule.rows:
            if row.host < 0:
                (_, grid), *operands = row.operands
                sizes = [self._programs(part, call, caches) for part in grid]
                if all(sizes):
                    found.append((row.kernel, sizes, [self._argument(o, call, caches) for o in operands]))
        return found

    def _programs(self, part: Any, call: Call, caches: Caches) -> int:
        match part:
            case int():
                return part
            case ("tokens", axis, per):
                return -(-call.counts[axis] // per)
            case ("tokens", axis, per, times):
                return -(-call.counts[axis] // per) * times
            case ("longest", axis, per):
                return -(-call.longest[axis] // per)
            case ("rows", times):
                return call.rows * times
            case ("rows", times, per):
                return -(-call.rows * times // per)
            case ("entries", name, per):
                return -(-caches[name].sizes["entries"] // per)
            case ("slots", name, per):
                return caches[name].sizes["slots"] // per
            case ("over", name, n, per):
                return -(-max(0, min(n, caches[name].sizes["entries"] - n)) // per)
        raise AssertionError(part)

    def _argument(self, operand: tuple[Any, ...], call: Call, caches: Caches) -> Number:
        match operand:
            case ("int" | "float", x):
                return x
            case ("tensor", buffer, offset):
                return call.buffer(buffer) + offset
            case ("weight", name, plane):
                return self.weight(name, plane)
            case ("axis", axis, array):
                return call.axes[axis, array]
            case ("count", axis):
                return call.counts[axis]
            case ("rows", _):
                return call.rows
            case ("state", name, array):
                return caches[name].address[array]
            case ("size", "round", _):
                return self._most
            case ("size", name, what):
                return caches[name].sizes[what]
            case ("round", array, *width):
                return self.round(array, call.rows, *width)
        raise AssertionError(operand)

    def weight(self, name: str, plane: int) -> int:
        """The address of a weight's plane; all of them are put there at the first use."""
        if (name, plane) not in self._addresses:
            type = self.program.params[name]
            form = plane_form(type.encoding, type.row)
            if plane < 0 or form is None:
                assert type.encoding is not None
                parts: tuple[torch.Tensor, ...] = (type.encoding.decode(self._weights[name], type.row).to(DTYPES[type.dtype]),)
            else:
                parts = planes(self._weights[name], type.encoding, form)
            for i, part in enumerate(parts):
                address = self.device.allocate(max(1, part.numel() * part.element_size()))
                self.device.write(address, part.contiguous())
                self._addresses[name, i if plane >= 0 else -1] = address
        return self._addresses[name, plane]

    def round(self, array: str, rows: int, width: int = 0) -> int:
        """The address of an array of a round, of the tokens that plain decoding leaves, or of ``width`` numbers a sequence."""
        key = array, rows, width
        if key not in self._round:
            known = {"path": 64, "tokens": max(1, self._most), "numbers": 3, "whole": 3}
            self._round[key] = self.device.allocate(8 * rows * (width or known.get(array, 1)))
        return self._round[key]

    def begin(self, rows: int, most: int) -> None:
        """A generation of up to ``most`` tokens for each of so many sequences."""
        for address in self._round.values():
            self.device.free(address)
        for call in self._calls.values():
            call.free()
        self._round, self._calls, self._most = {}, {}, most

    def free(self) -> None:
        """Give back all memory, that of the weights too."""
        self.begin(0, 0)
        for address in self._addresses.values():
            self.device.free(address)
        self._addresses = {}

    def output(self, call: Call, index: int) -> torch.Tensor:
        """An output of a call, copied to the host, ``[tokens, ...]``."""
        _, buffer, offset, _, shape, dtype, axis = call.schedule.outputs[index]
        assert offset == 0
        found = torch.empty(call.counts[axis], *shape, dtype=DTYPES[dtype])
        self.device.read(call.buffer(buffer), found)
        return found

    def read_round(self, array: str, rows: int) -> torch.Tensor:
        width = {"path": 64, "tokens": self._most}.get(array, 1)
        found = torch.empty(rows, width, dtype=torch.int64)
        self.device.read(self.round(array, rows), found)
        return found
