"""An op is one Python function: its body is the semantics in plain PyTorch.

The body serves as documentation, as the reference interpreter, as the oracle for every kernel and as the check for raising.
Beside it stand a type rule and a cost rule. A body may ask for ``at`` (the `Tokens` of its first token axis). An op that makes a
token axis (attribute ``axis``) returns ``(result, tokens)``; one that runs other graphs takes ``run``, or ``run_on`` to run them
on tokens of its own: ``run_on(target, operands, tokens)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar

from elision.errors import BadInput
from elision.ir.states import Array
from elision.ir.types import DTYPES, Axis, Tensor
from elision.ir.value import Graph, Type, Types, Value


@dataclass
class Cost:
    """FLOPs, bytes read by operand (argument index) and bytes written."""

    flops: float = 0.0
    read: dict[int, float] = field(default_factory=dict)
    write: float = 0.0


CostRule = Callable[..., Cost]
Body = TypeVar("Body", bound=Callable[..., Any])


@dataclass
class Op:
    """``infer(*types, **attrs)`` gives the result type or raises BadInput; ``cost(sizes, types, result, attrs)`` overrides
    the default cost (every operand read once, the result written once, no FLOPs). ``encoded``: operands that may be encoded
    weights, which the body gets as `elision.ir.weights.Encoded`. ``runs_on``: it runs graphs on tokens of its own."""

    name: str
    body: Callable[..., Any]
    infer: Callable[..., Types]
    cost: CostRule | None = None
    wants_at: bool = False
    runs: bool = False
    runs_on: bool = False
    makes_axis: bool = False
    encoded: tuple[int, ...] = ()


OPS: dict[str, Op] = {}


def op(
    infer: Callable[..., Types],
    *,
    cost: CostRule | None = None,
    makes_axis: bool = False,
    name: str | None = None,
    encoded: tuple[int, ...] = (),
) -> Callable[[Body], Body]:
    """Register the decorated body as an op with this type rule."""

    def register(body: Body) -> Body:
        key = name or body.__name__
        wants = inspect.signature(body).parameters
        OPS[key] = Op(key, body, infer, cost, "at" in wants, "run" in wants, "run_on" in wants, makes_axis, encoded)
        return body

    return register


def lookup(name: str) -> Op:
    """The op of that name. Raises BadInput if there is none."""
    from elision.ir import ops  # registers all ops on first use

    del ops
    found = OPS.get(name)
    if found is None:
        raise BadInput(f"unknown op {name!r}; the ops are {', '.join(sorted(OPS))}")
    return found


def infer_type(name: str, args: tuple[Value, ...], attrs: Mapping[str, Any], targets: Mapping[str, Graph]) -> Types:
    """The result type of an op by its rule. Raises BadInput naming the op and the types given."""
    types: list[Types] = [a.type for a in args]
    found = lookup(name)
    try:
        for i, t in enumerate(types):
            plain = found.runs or found.runs_on or i in found.encoded or not isinstance(t, Tensor) or t.encoding is None
            need(plain, f"operand {i} cannot be a stored weight; keep it as plain numbers")
        if "target" in attrs:
            need(attrs["target"] in targets, f"no template or entry {attrs['target']!r}; there are {', '.join(targets)}")
            return found.infer(*types, graph=targets[attrs["target"]], **attrs)
        if found.runs_on:
            missing = [t for t in attrs["targets"] if t not in targets]
            need(not missing, f"no entry {', '.join(missing)}; there are {', '.join(targets)}")
            return found.infer(*types, graphs=[targets[t] for t in attrs["targets"]], **attrs)
        return found.infer(*types, **attrs)
    except (BadInput, AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
        given = ", ".join(str(t) if isinstance(t, Tensor) else type(t).__name__ for t in types)
        shown = ", ".join(f"{k}={v!r}" for k, v in attrs.items())
        raise BadInput(f"{name}({given}; {shown}): {err}") from err


def need(condition: bool, message: str) -> None:
    """Type rules state their expectations with this."""
    if not condition:
        raise BadInput(message)


def token_axis(*types: Types) -> Axis:
    """The one token axis of the operands. Raises BadInput if there is none or if two mix (rule axis)."""
    found = {t.tokens for t in types if isinstance(t, Tensor) and t.tokens is not None}
    need(len(found) == 1, f"expected one token axis, got {', '.join(sorted(map(str, found))) or 'none'}")
    axis = found.pop()
    assert axis is not None
    return axis


def substitute(axis: Axis, mapping: Mapping[Axis, Axis]) -> Axis:
    """The axis with its ancestors replaced by ``mapping`` (formal to actual)."""
    if axis in mapping:
        return mapping[axis]
    return Axis(axis.name, substitute(axis.parent, mapping), axis.draft) if axis.parent is not None else axis


def substitute_type(type: Type, mapping: Mapping[Axis, Axis]) -> Type:
    if not isinstance(type, Tensor):
        return type
    return replace(type, axes=tuple(substitute(d, mapping) if isinstance(d, Axis) else d for d in type.axes))


def bind_axes(formals: list[Types], actuals: list[Types]) -> dict[Axis, Axis]:
    """Which actual axis each formal token axis stands for. Raises BadInput when one formal would be two axes."""
    mapping: dict[Axis, Axis] = {}
    for formal, actual in zip(formals, actuals, strict=True):
        if not isinstance(formal, Tensor) or not isinstance(actual, Tensor):
            continue
        need(len(formal.axes) == len(actual.axes), f"expected {formal}, got {actual}")
        for f, a in zip(formal.axes, actual.axes, strict=True):
            if isinstance(f, Axis) and isinstance(a, Axis):
                need(mapping.setdefault(f, a) == a, f"axis {f} would be both {mapping[f]} and {a}")
            else:
                need(f == a, f"expected {formal}, got {actual}")
        need((formal.dtype, formal.encoding) == (actual.dtype, actual.encoding), f"expected {formal}, got {actual}")
    return mapping


@dataclass(frozen=True)
class Sizes:
    """What the cost rules need to know of a call: ``tokens`` of the call, ``rows`` (sequences), ``context`` (entries that each
    token attends to), and counts of other token axes by name (of those that every program has, the counts follow)."""

    tokens: int
    rows: int = 1
    context: int = 0
    axes: Mapping[str, int] = field(default_factory=dict)

    def of(self, dim: Axis | int) -> int:
        """Elements along an axis."""
        if isinstance(dim, int):
            return dim
        if dim.name == "length" and dim.parent is not None:  # of the tokens that were padded, per row
            return -(-self.of(dim.parent) // self.rows)
        usual = {"b": self.rows, "rows": self.rows, "entries": self.context}
        return self.axes.get(dim.name, usual.get(dim.name, self.tokens))

    def elements(self, type: Tensor) -> int:
        count = 1
        for dim in type.axes:
            count *= self.of(dim)
        return count

    def bytes(self, type: Tensor) -> int:
        """Bytes in memory, of an encoded weight those of its blocks."""
        shape, dtype = type.storage
        return prod(map(self.of, shape)) * dtype.itemsize

    def state_bytes(self, type: Array) -> int:
        """Bytes of an array state's value over all sequences."""
        return self.rows * prod(type.shape) * DTYPES[type.dtype].itemsize
