"""Ops that make the token axis of an image. The image axis has one entry per sequence; its patches are the tokens."""

from __future__ import annotations

import torch

from elision.ir.op import need, op, token_axis
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor


def _patches_type(x: Tensor, *, height: int, width: int, axis: str) -> Tensor:
    token_axis(x)
    need(axis.isidentifier(), f"axis={axis!r} is not a name")
    sizes = [d for d in x.axes[1:] if isinstance(d, int)]
    need(len(x.axes) == 4 and len(sizes) == 3, f"expected images [b, channels, height, width], got {x}")
    need(0 < height <= sizes[1] and 0 < width <= sizes[2], f"no patch of {height} x {width} in {x}")
    return x.with_axes(Axis(axis), sizes[0] * height * width)


@op(_patches_type, makes_axis=True)
def patches(x: torch.Tensor, *, height: int, width: int, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """Images ``[b, c, h, w]`` cut into patches without overlap, row by row, as the new axis ``axis``: ``[patches, c height
    width]``; what is left at the right and lower edges is dropped. Positions count the patches of an image from 0.
    """
    b, c = x.shape[:2]
    down, across = x.shape[2] // height, x.shape[3] // width
    cut = x[:, :, : down * height, : across * width].reshape(b, c, down, height, across, width)
    count = down * across
    tokens = Tokens(at.row.repeat_interleave(count), torch.arange(count).repeat(b), at.rows)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b * count, c * height * width), tokens


def _prepend_type(x: Tensor, first: Tensor, *, axis: str) -> Tensor:
    need(not token_axis(x).drafted and axis.isidentifier(), f"cannot put tokens before {x} as the axis {axis!r}")
    need(first.tokens is None and first.axes[1:] == x.axes[1:] and first.dtype == x.dtype, f"{first} does not fit {x}")
    return x.with_axes(Axis(axis), *x.axes[1:])


@op(_prepend_type, makes_axis=True)
def prepend(x: torch.Tensor, first: torch.Tensor, *, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """The tokens of every sequence with the tokens ``first [k, ..]`` before them, as the new axis ``axis``; positions grow
    by k."""
    there, k = torch.tensor(sorted(set(at.row.tolist()))), first.shape[0]
    row = torch.cat((there.repeat_interleave(k), at.row))
    pos = torch.cat((torch.arange(k).repeat(len(there)), at.pos + k))
    order = torch.argsort(row, stable=True)  # the new ones of a row come first
    values = torch.cat((first.repeat(len(there), *(1,) * (first.dim() - 1)), x))
    return values[order], Tokens(row[order], pos[order], at.rows)
