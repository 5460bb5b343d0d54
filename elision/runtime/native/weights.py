"""Weights as native code reads them. Each is resident in one form: who asks for the values gets them unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from elision.ir.packing import pack, unpack
from elision.ir.program import Program


class PackedWeights(Mapping[str, torch.Tensor]):
    """The weights of a program, those that ``packings`` names packed. A look-up unpacks (an encoded weight: into its stored
    rows); nothing is kept of that."""

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor], packings: Mapping[str, str]) -> None:
        self._program, self.packings = program, dict(packings)
        self._data: dict[str, torch.Tensor] = {}
        for name in program.params:
            self._data[name] = self._packed(name, weights[name])

    def _packed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        how = self.packings.get(name, "plain")
        if how == "plain":
            found = weight.contiguous()
            return found if found.data_ptr() % 64 == 0 or name not in self.packings else found.clone()
        return pack(weight, how)

    def address(self, name: str) -> int:
        return self._data[name].data_ptr()

    def __getitem__(self, name: str) -> torch.Tensor:
        how = self.packings.get(name, "plain")
        data = self._data[name]
        if how == "plain":
            return data
        type = self._program.params[name]
        return unpack(data, how, tuple(d for d in type.axes if isinstance(d, int)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def nbytes(self) -> int:
        """Bytes that are resident."""
        return sum(x.numel() * x.element_size() for x in self._data.values())
