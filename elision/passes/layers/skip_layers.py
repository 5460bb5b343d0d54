"""Leave layers out of the model, or one of their halves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.program import Program
from elision.passes.base import Pass, register


@register
@dataclass(frozen=True)
class SkipLayers(Pass):
    """Static layer skipping: the residual stream passes by the layers named.

    The rewrite in one sentence: every entry's calls of those blocks are replaced by their stream operand, and their caches
    and weights are dropped. ``layers``: indices in the model as it was raised, from 0 (text: ``3+7-9``); one that is named
    twice is left out once. ``half``: ``attn`` or ``mlp`` to leave out just that part. Positions and masks do not change.
    Identity setting: no layers. This is ShortGPT's edit (Men et al. 2024) without its choice of layers, and LayerDrop's
    inference (Fan et al. 2019).
    """

    layers: tuple[int, ...] = ()
    half: str = ""

    name: ClassVar[str] = "skip-layers"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "blocks"

    @classmethod
    def example(cls, program: Program) -> SkipLayers:
        return cls((next(iter(program.layers), 0),))

    def apply(self, program: Program) -> None:
        if self.half not in ("", "attn", "mlp"):
            raise BadInput(f"{self.name}: half={self.half!r}; expected attn or mlp")
        leave_out(program, self.layers, self.half, self.name)


def leave_out(program: Program, layers: Iterable[int], half: str, by: str) -> None:
    """Leave out the layers, or that half of each (empty: all of it). Raises BadInput, in the name of the pass ``by``, for one
    that is not there and if nothing would stay."""
    there, layers = program.layers, dict.fromkeys(layers)
    if layers and not half and not set(there) - set(layers):
        raise BadInput(f"{by}: every layer of {program.name} would be left out; keep at least one")
    for index in layers:
        if index not in there:
            raise BadInput(f"{by}: there is no layer {index}; the layers of {program.name} are {_spans(sorted(there))}")
        try:
            there[index].bypass(half or None)
        except BadInput as err:
            raise BadInput(f"{by}: {err}") from None


def _spans(indices: list[int]) -> str:
    if indices and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices)) or "none"
