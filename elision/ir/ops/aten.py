"""Ops that were not raised, and the padded layout that they run in.

An opaque op is typed and executed by torch between ``pad`` and ``unpad``. It is never a failure, and always counted in
the coverage report. Passes that change a token axis are refused across it (rule axis).
"""

from __future__ import annotations

from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.op import Cost, Sizes, need, op, token_axis
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES, Axis, Tensor


def _aten_type(*types: Tensor, function: str, template: tuple[Any, ...], results: Tensor, rowwise: bool = False) -> Tensor:
    resolve(function)
    legal = all(_legal(item, len(types)) for item in template)
    need(legal, f"template {template!r} holds something other than numbers, operands, lists and dtypes")
    return results


def _aten_cost(sizes: Sizes, types: list[Tensor], result: Tensor, attrs: dict[str, Any]) -> Cost:
    """FLOPs as torch counts them (products, convolutions, attention); at least one per element of the largest tensor."""
    from torch.utils.flop_counter import FlopCounterMode

    shaped = tuple(torch.empty([sizes.of(d) for d in t.axes], dtype=DTYPES[t.dtype], device="meta") for t in types)
    try:
        with FlopCounterMode(display=False) as counter:
            call(attrs["function"], attrs["template"], shaped)
        counted = counter.get_total_flops()
    except (RuntimeError, TypeError, ValueError, IndexError):  # sizes that it was not raised for, or no rule for shapes alone
        counted = 0
    read = {i: float(sizes.bytes(t)) for i, t in enumerate(types)}
    return Cost(float(max(counted, *(sizes.elements(t) for t in (*types, result)))), read, float(sizes.bytes(result)))


@op(_aten_type, cost=_aten_cost)
def aten(*x: torch.Tensor, function: str, template: tuple[Any, ...], results: Tensor, rowwise: bool = False) -> Any:
    """Call ``torch.ops.aten.<function>`` with positional arguments ``template``: ``("arg", i)`` stands for operand i,
    ``("list", ...)`` for a list. ``results`` is the type of the (one) result; ``rowwise`` says that it was seen to look at
    one token at a time, without which it can only run over whole sequences."""
    return call(function, template, x)


def call(function: str, template: tuple[Any, ...], x: tuple[torch.Tensor, ...]) -> Any:
    """The operator's result for these operands."""
    return resolve(function)(*(_fill(t, x) for t in template))


def _legal(item: Any, operands: int) -> bool:
    """No text but the markers: an operator that takes a file name, say, is not for a program."""
    match item:
        case ("arg", int(i)):
            return 0 <= i < operands
        case ("list", *items):
            return all(_legal(i, operands) for i in items)
        case ("dtype", str(name)):
            return name in DTYPES
    return item is None or isinstance(item, bool | int | float)


def _fill(item: Any, x: tuple[torch.Tensor, ...]) -> Any:
    if isinstance(item, tuple) and item and item[0] == "arg":
        return x[item[1]]
    if isinstance(item, tuple) and item and item[0] == "list":
        return [_fill(i, x) for i in item[1:]]
    if isinstance(item, tuple) and item and item[0] == "dtype":
        return DTYPES[item[1]]
    return item


def resolve(name: str) -> Any:
    """The overload ``packet.overload`` of the aten namespace. Raises BadInput for anything else."""
    packet, _, overload = name.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None) if packet.isidentifier() else None
    if not isinstance(found, torch._ops.OpOverload):
        raise BadInput(f"no aten op {name!r}")
    return found


def _pad_type(x: Tensor) -> Tensor:
    axis = token_axis(x)
    return x.with_axes(Axis("rows", parent=axis), Axis("length", parent=axis), *x.axes[1:])


@op(_pad_type)
def pad(x: torch.Tensor, *, at: Tokens) -> torch.Tensor:
    """Token-major ``[t, ..]`` to padded ``[rows, length, ..]``, zeros on the right."""
    row, column, length = _places(at)
    y = x.new_zeros((at.rows, length, *x.shape[1:]))
    y[row, column] = x
    return y


def _unpad_type(x: Tensor, y: Tensor) -> Tensor:
    need(len(y.axes) >= 2, f"expected a padded tensor [rows, length, ..], got {y}")
    return y.with_axes(token_axis(x), *y.axes[2:])


@op(_unpad_type)
def unpad(x: torch.Tensor, y: torch.Tensor, *, at: Tokens) -> torch.Tensor:
    """Back from padded ``y [rows, length, ..]`` to the token axis of ``x``."""
    row, column, _ = _places(at)
    return y[row, column]


def _places(at: Tokens) -> tuple[torch.Tensor, torch.Tensor, int]:
    counts = torch.bincount(at.row, minlength=at.rows)
    first = torch.cumsum(counts, 0) - counts
    column = torch.arange(len(at)) - first[at.row]
    return at.row, column, int(counts.max()) if len(at) else 0
