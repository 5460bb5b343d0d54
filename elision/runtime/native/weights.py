"""Weights as native code reads them. Each is resident in one form: who asks for the values gets them unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from elision.ir.packing import pack, unpack
from elision.ir.program import Program


class PackedWeights(Mapping[str, torch.Tensor]):
    """The weights of a program as they lie in memory (``stored``), those that ``packings`` names packed. A look-up unpacks (an
    encoded weight: into its stored rows); nothing is kept of that."""

    def __init__(self, program: Program, stored: Mapping[str, torch.Tensor], packings: Mapping[str, str]) -> None:
        self._program, self.stored, self.packings = program, dict(stored), dict(packings)

    @classmethod
    def pack(cls, program: Program, weights: Mapping[str, torch.Tensor], packings: Mapping[str, str]) -> PackedWeights:
        """Pack plain weights; those that share their memory share it packed, too."""
        stored: dict[str, torch.Tensor] = {}
        known: dict[tuple[int, tuple[int, ...], tuple[int, ...], str], torch.Tensor] = {}
        for name in program.params:
            weight, how = weights[name], packings.get(name, "")
            key = (weight.data_ptr(), tuple(weight.shape), weight.stride(), how)
            if key not in known or not weight.numel():
                known[key] = _packed(weight, how)
            stored[name] = known[key]
        return cls(program, stored, packings)

    def of(self, program: Program) -> PackedWeights:
        """The same memory, for a program that reads some of it by kernels of the same packings."""
        return PackedWeights(program, {name: self.stored[name] for name in program.params}, self.packings)

    def address(self, name: str) -> int:
        return self.stored[name].data_ptr()

    def __getitem__(self, name: str) -> torch.Tensor:
        how, data = self.packings.get(name, "plain"), self.stored[name]
        if how == "plain":
            return data
        return unpack(data, how, self._program.params[name].sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _packed(weight: torch.Tensor, how: str) -> torch.Tensor:
    """``how``: a packing, or "" for a weight that native code does not read."""
    if how in ("", "plain"):
        found = weight.contiguous()
        return found if not how or found.data_ptr() % 64 == 0 else found.clone()
    return pack(weight, how)
