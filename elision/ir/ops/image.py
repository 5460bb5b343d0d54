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


def _extended_type(x: Tensor, *, k: int, axis: str) -> Tensor:
    need(not token_axis(x).drafted and axis.isidentifier(), f"cannot put tokens before {x} as the axis {axis!r}")
    need(k > 0, f"k={k}; expected at least one token")
    return Tensor((Axis(axis),), "i64")


@op(_extended_type, makes_axis=True)
def extended(x: torch.Tensor, *, k: int, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """Room for ``k`` tokens before those of every sequence, as the new axis ``axis``; positions grow by k. Result: the index in
    x of each token, -k .. -1 for the new ones."""
    there = torch.unique_consecutive(at.row)
    row = torch.cat((there.repeat_interleave(k), at.row))
    pos = torch.cat((torch.arange(k).repeat(len(there)), at.pos + k))
    index = torch.cat((torch.arange(-k, 0).repeat(len(there)), torch.arange(len(at))))
    order = torch.argsort(row, stable=True)  # the new ones of a row come first
    return index[order], Tokens(row[order], pos[order], at.rows)


def _prepend_type(x: Tensor, first: Tensor, index: Tensor) -> Tensor:
    token_axis(x)
    need(first.tokens is None and first.axes[1:] == x.axes[1:] and first.dtype == x.dtype, f"{first} does not fit {x}")
    need(index.tokens is not None and index.dtype == "i64" and len(index.axes) == 1, f"expected an index i64[t], got {index}")
    assert index.tokens is not None
    return x.with_axes(index.tokens, *x.axes[1:])


@op(_prepend_type)
def prepend(x: torch.Tensor, first: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The tokens of every sequence with the tokens ``first [k, ..]`` before them; ``index`` is what `extended` gives."""
    return torch.cat((x, first))[index]
