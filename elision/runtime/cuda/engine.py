"""Entries on a GPU: weights go there once, a call's tokens and launches each time; nothing is asked of the device in between."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from elision.ir.flatten import flat_entries
from elision.ir.kept import is_counted, stay, twins
from elision.ir.launch import DeviceCode, need_kernels, shape_of
from elision.ir.nodes import counts_of, nodes_of
from elision.ir.op import lookup
from elision.ir.planes import plane_form, planes
from elision.ir.program import Program
from elision.ir.schedule import Schedule
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES
from elision.ir.value import Value
from elision.runtime.cuda.device import Device, Held, Number

Caches = Mapping[str, Held]
_ALIGNED = 256  # bytes

#: The tokens of an axis, and further arrays of it: ``index``, of one that was chosen from another which of its tokens they are.
Made = tuple[Tokens, dict[str, torch.Tensor]]


def _made(value: Value, parent: Tokens) -> Made:
    """The axis that an op makes of another, without what it makes of the numbers there."""
    x = torch.empty(len(parent), *value.args[0].tensor.sizes, device="meta")
    index, tokens = lookup(value.op).body(x, **dict(value.attrs), at=parent)
    return tokens, {} if index.is_meta else {"index": index}


def _left(value: Value, before: Tokens, placed: Tokens) -> Made:
    """The axis of the tokens that stay by an op. Which they are, and where, is found on the device."""
    counts, ends = counts_of(before)[1].tolist(), torch.searchsorted(placed.row, torch.arange(placed.rows + 1)).tolist()
    spans = [int(placed.pos[b - 1] - placed.pos[a]) + 1 if b > a else 0 for a, b in zip(ends, ends[1:], strict=False)]
    left = torch.tensor([stay(value, n, span) for n, span in zip(counts, spans, strict=True)])
    row = torch.arange(before.rows).repeat_interleave(left)
    unknown = torch.zeros(len(row), dtype=torch.int64)
    more = {"twins": torch.tensor([twins(value, n) for n in counts])} if value.op == "prune" else {}
    return Tokens(row, unknown, before.rows), {"index": unknown, **more}


class Call:
    """An entry for a class of shapes, with memory for the tokens of each axis that it was made for; kept, so that graphs stay
    valid."""

    def __init__(self, engine: Engine, schedule: Schedule, room: Mapping[int, int], rows: int) -> None:
        self.schedule, self.room, self.rows, self.device = schedule, room, rows, engine.device
        slots: dict[int, int] = {}
        for buffer in schedule.buffers:
            if buffer.slot >= 0:
                slots[buffer.slot] = max(slots.get(buffer.slot, 0), buffer.width * room[buffer.axis])
        self.slots = {slot: self.device.allocate(max(256, nbytes)) for slot, nbytes in slots.items()}
        self.axes: dict[tuple[int, str], int] = {}
        self.counts: dict[int, int] = {}
        self.longest: dict[int, int] = {}
        self.feeds = all(row.host < 0 for row in schedule.rows)  # no axis depends on positions
        self.fed: tuple[Any, ...] = ()  # which tokens, of which caches, are on the device already (`Natives`)
        self.graphs: weakref.WeakKeyDictionary[Held, dict[Any, Callable[[], None]]] = weakref.WeakKeyDictionary()

    def buffer(self, index: int) -> int:
        slot = self.schedule.buffers[index].slot
        return self.slots[slot] if slot >= 0 else 0

    def set_axis(self, index: int, at: Tokens, more: Mapping[str, torch.Tensor]) -> None:
        """Put an axis's arrays where kernels find them."""
        start = torch.searchsorted(at.row, torch.arange(self.rows + 1))
        arrays = {"row": at.row, "pos": at.pos, "start": start}
        if at.anc is not None and at.parent is not None:
            arrays |= {"anc": at.anc, "node": nodes_of(at), "parent": at.parent}
        else:
            end = start[at.row + 1]
            arrays["ahead"] = end - 1 - torch.arange(len(at)) if at.ahead is None else at.ahead
        for name, array in {**arrays, **more}.items():
            if (index, name) not in self.axes:
                self.axes[index, name] = self.device.allocate(8 * (max(self.room[index], self.rows) + 1))
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
        self.graphs = flat_entries(program)
        self._addresses, self._arena = dict[tuple[str, int], int](), 0
        self._calls: dict[tuple[str, str], Call] = {}
        self._round: dict[tuple[str, int, int], int] = {}
        self._most = 0

    def call(self, entry: str, at: Tokens, *given: torch.Tensor) -> Call:
        """Memory for a call of an entry with these tokens, which are put there, and what is ``given`` of them."""
        schedules = self.code.schedules[entry]
        shape = shape_of(len(at), schedules)
        axes = self._axes(entry, schedules[shape], at)
        room = {i: max(len(tokens), {"one": 1, "few": 16, "some": 64}.get(shape, 1)) for i, (tokens, _) in axes.items()}
        found = self._calls.get((entry, shape))
        if found is None or found.rows != at.rows or any(found.room[i] < len(tokens) for i, (tokens, _) in axes.items()):
            if found is not None:
                found.free()
            found = self._calls[entry, shape] = Call(self, schedules[shape], room, at.rows)
        found.fed = ()
        for i, (tokens, more) in axes.items():
            found.set_axis(i, tokens, more)
        for buffer, x in zip(found.schedule.inputs, given, strict=True):
            self.device.write(found.buffer(buffer), (x if x.is_floating_point() else x.long()).contiguous())
        return found

    def known(self, entry: str, at: Tokens) -> Call | None:
        """What `call` made for so many tokens before, as it was left."""
        return self._calls.get((entry, shape_of(len(at), self.code.schedules[entry])))

    def _axes(self, entry: str, schedule: Schedule, at: Tokens) -> dict[int, Made]:
        """The tokens of every axis: those that are given, and what ops make of them."""
        found: dict[int, Made] = {0: (at, {})}
        placed = {0: at}  # by axis, the nearest before it whose positions are known here; it begins and ends where they do
        for row in schedule.rows:
            if row.host >= 0:
                _, axis, parent = row.operands[0]
                value, before = self.graphs[entry].values[row.host], found[parent][0]
                counted = is_counted(value.args[0])
                found[axis] = _left(value.args[0], before, placed[parent]) if counted else _made(value, before)
                placed[axis] = placed[parent] if counted else found[axis][0]
        return found

    def run(self, call: Call, caches: Caches) -> None:
        """The launches of a call, in order."""
        for launch in self._launches(call, caches, call.schedule):
            self.device.launch(*launch)

    def graph(self, call: Call, caches: Caches, entries: Sequence[str] = ()) -> Callable[[], None]:
        """The launches of a call, or those of several entries on its tokens (its own, and such as have no values), as a graph.
        What they need is there before they are recorded."""
        there = self.code.schedules
        schedules = [call.schedule if n == call.schedule.entry else there[n]["many"] for n in entries] or [call.schedule]
        launches = [launch for schedule in schedules for launch in self._launches(call, caches, schedule)]

        def all_of_them() -> None:
            for launch in launches:
                self.device.launch(*launch)

        return self.device.record(all_of_them)

    def _launches(self, call: Call, caches: Caches, schedule: Schedule) -> list[tuple[str, list[int], list[Number]]]:
        """Kernels, grids and arguments, but for launches of no program."""
        found = []
        for row in schedule.rows:
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
            case ("input", index):
                return call.buffer(call.schedule.inputs[index])
            case ("output", index):
                return call.buffer(call.schedule.outputs[index][1])
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
        """The address of a weight's plane; of -1, of its decoded numbers."""
        if not self._addresses:
            self._place()
        return self._addresses[name, plane]

    def _place(self) -> None:
        """All weights that launches read, in one piece of memory."""
        schedules = [s for shapes in self.code.schedules.values() for s in shapes.values()]
        used = {(o[1], o[2] < 0) for s in schedules for row in s.rows for o in row.operands if o[0] == "weight"}
        sizes = {key: self._weight_bytes(*key) + 3 * _ALIGNED for key in sorted(used)}
        at = self._arena = self.device.allocate(max(1, sum(sizes.values())))
        for name, decoded in sizes:
            for i, part in enumerate(self._parts(name, decoded)):
                self.device.write(at, part.contiguous())
                self._addresses[name, -1 if decoded else i] = at
                at += -(-part.numel() * part.element_size() // _ALIGNED) * _ALIGNED

    def _weight_bytes(self, name: str, decoded: bool) -> int:
        type, stored = self.program.params[name], self._weights[name]
        return prod(type.sizes) * DTYPES[type.dtype].itemsize if decoded else stored.numel() * stored.element_size()

    def _parts(self, name: str, decoded: bool) -> tuple[torch.Tensor, ...]:
        type, stored = self.program.params[name], self._weights[name]
        if decoded:
            assert type.encoding is not None
            return (type.encoding.decode(stored, type.row).to(DTYPES[type.dtype]),)
        form = plane_form(type.encoding, type.row if type.axes else 1)
        assert form is not None
        return planes(stored, type.encoding, form)

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
        if self._addresses:
            self.device.free(self._arena)
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
