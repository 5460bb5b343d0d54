"""Drafts made on the device (`elision.codegen.triton.drafts`): a drafter's tables, and the tokens of a run to draft from."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch

from elision.ir.drafting.drafter import Drafter
from elision.ir.drafting.proposal import Array, Proposal
from elision.ir.requests import Requests
from elision.runtime.cuda.device import Device, free_all


class Tables:
    """The tables of a model's drafter, which are on the device while rounds draft there and with the host while those of the
    host do."""

    def __init__(self, device: Device, drafter: Drafter) -> None:
        self._device, self.drafter, self.here = device, drafter, False
        self.address = {n: device.allocate(max(1, table.nbytes)) for n, table in drafter.tables().items()}
        weakref.finalize(self, free_all, device, tuple(self.address.values())).atexit = False  # the device may be gone by then

    def bring(self) -> None:
        """To the device."""
        if not self.here:
            self.here = True
            for name, table in self.drafter.tables().items():
                self._device.write(self.address[name], torch.from_numpy(table))

    def take_home(self) -> None:
        """To the host."""
        if self.here:
            self.here = False
            for name, table in self.drafter.tables().items():
                self._device.read(self.address[name], torch.from_numpy(table))


class DeviceDrafts:
    """The drafts of a run of ``rows`` sequences of up to ``capacity`` tokens. What the host has told is told again only where it
    has changed."""

    def __init__(self, device: Device, tables: Tables, drafter: Drafter, rows: int, capacity: int) -> None:
        assert drafter.template is not None
        self.tables, self._drafter, self._device, self._tree = tables, drafter, device, drafter.template
        self.rows, self.sizes = rows, {"capacity": capacity}
        template = _template(self._tree)
        self._wide = 4 + 3 * len(self._tree)
        widths = {"history": rows * capacity, "length": rows, "room": rows, "told": rows * self._wide, "template": template.size}
        own = {n: device.allocate(8 * w) for n, w in (*widths.items(), ("rates", len(drafter.rates.tried)))}
        self.address = own | tables.address
        device.write(own["template"], torch.from_numpy(template))
        self._lengths, self._room, self._rates = np.zeros(rows, np.int64), np.zeros(rows, np.int64), np.zeros(0)
        weakref.finalize(self, free_all, device, tuple(own.values())).atexit = False

    def begin(self, rows: Sequence[int], requests: Requests) -> Array:
        """What the round of these sequences needs to know; the levels that the tree of each may have."""
        self.tables.bring()
        lengths, room = self._lengths.copy(), self._room.copy()
        for r in rows:
            history = requests.histories[r]
            room[r] = min(max(0, requests.room[r]), int(self._tree.depth[-1]))
            if self._lengths[r] != len(history):  # the host has continued it
                self._device.write(self.address["history"] + 8 * r * self.sizes["capacity"], history.contiguous())
                lengths[r] = len(history)
        rates = self._drafter.rates.of(np.arange(len(self._drafter.rates.tried)))
        self._lengths = self._known("length", lengths, self._lengths)
        self._room, self._rates = self._known("room", room, self._room), self._known("rates", rates, self._rates)
        return room[list(rows)]

    def _known(self, name: str, now: Array, before: Array) -> Array:
        if not np.array_equal(now, before):
            self._device.write(self.address[name], torch.from_numpy(now.copy()))
        return now

    def end(self, rows: Sequence[int]) -> tuple[list[int], list[list[int]], list[Proposal | None]]:
        """Of these sequences, once the round is done: how many nodes were drafted, the new tokens, and all that was guessed."""
        told = torch.empty(self.rows, self._wide, dtype=torch.int64)
        self._device.read(self.address["told"], told)
        lines, n = told.numpy()[list(rows)], len(self._tree)
        self._lengths[list(rows)] += lines[:, 1]
        tokens = [line[4 : 4 + line[1]].tolist() for line in lines]
        return lines[:, 0].tolist(), tokens, [self._proposal(line[4 + n : 4 + 2 * n], line[4 + 2 * n :]) for line in lines]

    def _proposal(self, token: Array, kind: Array) -> Proposal | None:
        there = np.flatnonzero(token >= 0)
        tree = self._tree
        if not len(there):
            return None
        return Proposal(token, tree.parent, tree.depth, kind).keep(np.concatenate(([0], there)))


def _template(tree: Proposal) -> Array:
    """As the kernels read it."""
    found = np.full((len(tree), 3 + int(tree.depth[-1])), -1, np.int64)
    found[:, 0], found[:, 1], found[:, 2] = tree.parent, tree.depth, tree.ancestors()
    for node in range(1, len(tree)):
        above, deep = tree.parent[node], tree.depth[node]
        found[node, 3 : 2 + deep] = found[above, 3 : 2 + deep]
        found[node, 2 + deep] = tree.kind[node]
    return found
