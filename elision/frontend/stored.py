"""Which blocks of a model's file a parameter of the raised program is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from elision.ir.blocks import Stored


def blocks_of(weights: Mapping[str, Tensor], model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The blocks of each of ``weights`` that is a parameter of ``model`` as it lies in memory, under whichever of its tied names
    the file has it; transposed views and expressions of a parameter have none. Blocks of plain 32-bit floats are left out."""
    known: dict[Any, Stored] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in stored and stored[name].format != "F32":
            known[_place(parameter)] = stored[name]
    return {name: known[place] for name, weight in weights.items() if (place := _place(weight)) in known}


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
