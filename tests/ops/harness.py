"""Runs one op through graph and interpreter, and holds its result against its type rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from elision.errors import BadInput
from elision.ir.interp import Interpreter
from elision.ir.program import Program
from elision.ir.tokens import Tokens
from elision.ir.types import NAMES, Axis, Tensor
from elision.ir.value import Builder, Graph

T = Axis("t")


@dataclass(frozen=True, eq=False)
class Weight:
    """An operand without tokens."""

    value: torch.Tensor


Operand = torch.Tensor | Weight


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def typed(x: Operand, axis: Axis = T) -> Tensor:
    """The type of an operand; the first axis of a tensor that is no weight is ``axis``."""
    value = x.value if isinstance(x, Weight) else x
    shape: tuple[Any, ...] = tuple(value.shape)
    return Tensor(shape if isinstance(x, Weight) else (axis, *shape[1:]), NAMES[value.dtype])


def run(graph: Graph, inputs: Mapping[str, Any], axes: Mapping[str, Tokens], targets: Mapping[str, Graph] | None = None) -> Any:
    """The outputs of a graph, each checked against its type."""
    found = Interpreter(Program("p", templates=dict(targets or {})), {}).run(graph, inputs, axes)
    known: dict[Axis, int] = {}
    for v, x in (*((v, inputs[graph.names[v]]) for v in graph.inputs), *zip(graph.outputs, found, strict=True)):
        if isinstance(v.type, Tensor):
            assert NAMES[x.dtype] == v.type.dtype and x.dim() == len(v.type.axes), f"{v.type} holds {x.dtype} {list(x.shape)}"
            for dim, size in zip(v.type.axes, x.shape, strict=True):
                assert size == (dim if isinstance(dim, int) else known.setdefault(dim, size)), f"{v.type} holds {list(x.shape)}"
    return found[0] if len(found) == 1 else found


def apply(op: str, *operands: Operand, at: Tokens | None = None, **attrs: Any) -> Any:
    """The op's result, or results, for operands on one token axis (and weights)."""
    b = Builder("g")
    values = [b.input(f"x{i}", typed(x)) for i, x in enumerate(operands)]
    inputs = {f"x{i}": x.value if isinstance(x, Weight) else x for i, x in enumerate(operands)}
    found = b.add(op, *values, **attrs)
    if at is None:
        lengths = [len(x) for x in operands if not isinstance(x, Weight)]
        at = Tokens.chunk([lengths[0] if lengths else 1], [0])
    return run(b.build(*found) if isinstance(found, tuple) else b.build(found), inputs, {"t": at})


def refused(message: str, op: str, *types: Any, **attrs: Any) -> None:
    """The op's type rule refuses these operands, naming the op and saying ``message`` (a pattern)."""
    b = Builder("g")
    with pytest.raises(BadInput, match=rf"(?s)^{op}\(.*{message}"):
        b.add(op, *(b.input(f"x{i}", t) for i, t in enumerate(types)), **attrs)


def f32(*axes: Axis | int) -> Tensor:
    return Tensor(axes, "f32")


def i64(*axes: Axis | int) -> Tensor:
    return Tensor(axes, "i64")
