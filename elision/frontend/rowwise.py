"""Does an opaque operator look at one token at a time? Decided by evaluating it."""

from __future__ import annotations

from typing import Any

import torch

from elision.ir.ops.aten import call
from elision.ir.types import DTYPES, FLOATS, Tensor

_ROWS, _LENGTH = 2, 5


def is_rowwise(function: str, template: tuple[Any, ...], types: list[Tensor]) -> bool:
    """True if changing one token's operands changes that token's result only, for two random draws.

    ``types``: of the operands, padded ones with two token axes in front. False also where the operator cannot be evaluated so.
    """
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        operands = [_draw(t, generator) for t in types]
        changed = [x.clone() for x in operands]
        for x, other, type in zip(changed, [_draw(t, generator) for t in types], types, strict=True):
            if type.tokens is not None:
                x[1, 2] = other[1, 2]
        try:
            before, after = (call(function, template, tuple(x)) for x in (operands, changed))
        except (RuntimeError, IndexError, TypeError, ValueError):
            return False
        if before.shape[:2] != (_ROWS, _LENGTH):
            return False
        same = (before == after) | (before.isnan() & after.isnan())
        same[1, 2] = True
        if not bool(same.all()):
            return False
    return True


def _draw(type: Tensor, generator: torch.Generator) -> torch.Tensor:
    sizes = iter((_ROWS, _LENGTH))
    shape = [d if isinstance(d, int) else next(sizes) for d in type.axes]
    if type.dtype in FLOATS:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[type.dtype])
    return torch.randint(0, 2, shape, generator=generator).to(DTYPES[type.dtype])
