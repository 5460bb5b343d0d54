"""Tensor types with named token axes.

An axis with a name is a *token axis*: an object with provenance. At run time it carries the row (sequence), the position and,
for drafted tokens, the ancestors of every token (`elision.ir.tokens.Tokens`). Two token axes never mix. Feature axes
are plain integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from elision.errors import BadInput
from elision.ir.weights import WeightEncoding

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("f64", "f32", "f16", "bf16")


@dataclass(frozen=True)
class Axis:
    """A token axis. ``parent`` is the axis that it was gathered or merged from; ``draft`` marks tokens not yet committed
    (nodes of a token tree): state written at a draft axis goes to Scratch or to the journal."""

    name: str
    parent: Axis | None = None
    draft: bool = False

    def __str__(self) -> str:
        if self.parent is not None:
            return f"{self.parent}/{self.name}"
        return f"draft({self.name})" if self.draft else self.name

    @property
    def drafted(self) -> bool:
        """True when this axis, or one that it comes from, holds drafted tokens."""
        return self.draft or (self.parent is not None and self.parent.drafted)

    @property
    def root(self) -> Axis:
        """The axis of all tokens of the call, from which this one was taken."""
        return self if self.parent is None else self.parent.root


Dim = int | Axis


@dataclass(frozen=True)
class Tensor:
    """A tensor: axes (token axes first) and dtype, printed as ``f32[t, 576]``.

    A weight may be stored in an ``encoding`` of its rows (the last axis), printed as ``f32[192, 576] in Q4_1``; ``dtype`` is
    then that of its values, to which they are rounded when they are decoded.
    """

    axes: tuple[Dim, ...]
    dtype: str
    encoding: WeightEncoding | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BadInput(f"unknown dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.encoding is not None:
            if self.dtype not in FLOATS or len(self.axes) < 2 or not all(isinstance(d, int) for d in self.axes):
                raise BadInput(f"{self} is no weight: expected floats on two or more axes that are sizes")
            self.encoding.row_bytes(self.row)

    def __str__(self) -> str:
        plain = f"{self.dtype}[{', '.join(map(str, self.axes))}]"
        return plain if self.encoding is None else f"{plain} in {self.encoding}"

    @property
    def tokens(self) -> Axis | None:
        """The leading token axis, or None for a tensor without tokens (a weight)."""
        return self.axes[0] if self.axes and isinstance(self.axes[0], Axis) else None

    @property
    def features(self) -> tuple[Dim, ...]:
        """The axes after the leading token axis (all of them if there is none)."""
        return self.axes[1:] if self.tokens is not None else self.axes

    @property
    def width(self) -> int:
        """Elements per token (all elements of a weight)."""
        size = 1
        for dim in self.features:
            if isinstance(dim, int):
                size *= dim
        return size

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of a tensor without tokens (a weight)."""
        return tuple(d for d in self.axes if isinstance(d, int))

    @property
    def row(self) -> int:
        """Elements along the last axis of a weight."""
        assert isinstance(self.axes[-1], int)
        return self.axes[-1]

    @property
    def storage(self) -> tuple[tuple[Dim, ...], torch.dtype]:
        """Shape and dtype of the tensor that holds it: for an encoded weight ``u8[..., row bytes]``."""
        if self.encoding is None:
            return self.axes, DTYPES[self.dtype]
        return (*self.axes[:-1], self.encoding.row_bytes(self.row)), torch.uint8

    def with_axes(self, *axes: Dim) -> Tensor:
        """A tensor of the same dtype on other axes: of values, not of stored ones."""
        return Tensor(axes, self.dtype)

    def with_dtype(self, dtype: str) -> Tensor:
        return replace(self, dtype=dtype)

    def stored(self, encoding: WeightEncoding | None) -> Tensor:
        """The same weight in another encoding. Raises BadInput unless its rows are whole groups of it."""
        return replace(self, encoding=encoding)


@dataclass(frozen=True)
class Host:
    """A run-time object that is not a tensor: ``requests`` (sampling parameters per row), ``mark`` (a checkpoint)."""

    kind: str

    def __str__(self) -> str:
        return f"Host({self.kind!r})"


def parse_dtype(dtype: str | torch.dtype) -> str:
    """The short name (``f32``) of a torch dtype or of its name (``float32``, ``torch.float32``, ``f32``)."""
    if isinstance(dtype, torch.dtype):
        name = NAMES.get(dtype)
    else:
        short = dtype.removeprefix("torch.")
        found = getattr(torch, short, None)
        name = short if short in DTYPES else NAMES.get(found) if isinstance(found, torch.dtype) else None
    if name is None:
        raise BadInput(f"unknown dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    return name
