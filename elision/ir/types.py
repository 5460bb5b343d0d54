"""Tensor types with named token axes.

An axis with a name is a *token axis*: an object with provenance. At run time it carries the row (sequence), the position and,
for drafted tokens, the ancestors of every token (`elision.ir.tokens.Tokens`). Two token axes never mix. Feature axes
are plain integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elision.errors import BadInput

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
    """A tensor: axes (token axes first) and dtype, printed as ``f32[t, 576]``."""

    axes: tuple[Dim, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BadInput(f"unknown dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.axes))}]"

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

    def with_axes(self, *axes: Dim) -> Tensor:
        return Tensor(axes, self.dtype)

    def with_dtype(self, dtype: str) -> Tensor:
        return Tensor(self.axes, dtype)


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
