"""Ops on token axes: choose, drop, merge and put back tokens. Positions and rows travel with the axis."""

from __future__ import annotations

import torch

from elision.ir.op import need, op, token_axis
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES, Axis, Tensor


def _child(x: Tensor, axis: str) -> Tensor:
    need(axis.isidentifier(), f"axis={axis!r} is not a name")
    return Tensor((Axis(axis, parent=token_axis(x)),), "i64")


def _last_type(x: Tensor, *, axis: str) -> Tensor:
    return _child(x, axis)


@op(_last_type, makes_axis=True)
def last(x: torch.Tensor, *, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """The index of the last token of every row that has tokens in the call, as the new axis ``axis``."""
    nxt = torch.cat((at.row[1:], at.row.new_full((1,), -1)))
    index = (at.row != nxt).nonzero().flatten()
    return index, at.gather(index)


@op(_last_type, makes_axis=True)
def first(x: torch.Tensor, *, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """The index of the first token of every row that has tokens in the call, as the new axis ``axis``."""
    before = torch.cat((at.row.new_full((1,), -1), at.row[:-1]))
    index = (at.row != before).nonzero().flatten()
    return index, at.gather(index)


def _which_type(mask: Tensor, *, axis: str) -> Tensor:
    need(mask.dtype == "bool" and len(mask.axes) == 1, f"expected bool[t], got {mask}")
    return _child(mask, axis)


@op(_which_type, makes_axis=True)
def which(mask: torch.Tensor, *, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """The indices where ``mask [t]`` is true, in order, as the new axis ``axis``."""
    index = mask.nonzero().flatten()
    return index, at.gather(index)


def _before_type(x: Tensor, *, until: int, axis: str) -> Tensor:
    need(until > 0, f"until={until}; expected a position after the first")
    return _child(x, axis)


@op(_before_type, makes_axis=True)
def before(x: torch.Tensor, *, until: int, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """The indices of the tokens at positions before ``until``, as the new axis ``axis``."""
    index = (at.pos < until).nonzero().flatten()
    return index, at.gather(index)


def _restrict_type(x: Tensor, sel: Tensor) -> Tensor:
    new = sel.tokens
    need(new is not None and sel.dtype == "i64", f"expected a selection i64[child], got {sel}")
    assert new is not None
    need(new.parent == token_axis(x), f"{sel} selects from {new.parent}, not from the axis of {x}")
    return x.with_axes(new, *x.axes[1:])


@op(_restrict_type)
def restrict(x: torch.Tensor, sel: torch.Tensor) -> torch.Tensor:
    """Drop every token that ``sel`` does not choose."""
    return x[sel]


def _clusters_type(assign: Tensor, *, axis: str) -> Tensor:
    need(assign.dtype == "i64" and len(assign.axes) == 1, f"expected i64[t], got {assign}")
    return _child(assign, axis)


@op(_clusters_type, makes_axis=True)
def clusters(assign: torch.Tensor, *, axis: str, at: Tokens) -> tuple[torch.Tensor, Tokens]:
    """The axis of merged tokens. ``assign [t]`` names for every token the token (index in t) that it joins; a token that
    stays names itself. Result: the indices of those that stay, as the new axis."""
    index = (assign == torch.arange(len(assign))).nonzero().flatten()
    return index, at.gather(index)


def _merge_type(x: Tensor, assign: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    axis = token_axis(x, assign, weight)
    need(len(weight.axes) == 1 and weight.dtype == x.dtype, f"expected a weight {x.dtype}[t], got {weight}")
    need(kept.tokens is not None and kept.tokens.parent == axis, f"{kept} does not come from {axis}")
    assert kept.tokens is not None
    return x.with_axes(kept.tokens, *x.axes[1:])


@op(_merge_type)
def merge(x: torch.Tensor, assign: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the tokens that join each kept one: ``sum(w x) / sum(w)`` over ``assign == kept``."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    total = torch.zeros_like(x).index_add_(0, assign, x * weight.view(shape))
    mass = torch.zeros_like(weight).index_add_(0, assign, weight)
    return total[kept] / mass[kept].view(shape)


def _collect_type(x: Tensor, assign: Tensor, kept: Tensor) -> Tensor:
    axis = token_axis(x, assign)
    need(kept.tokens is not None and kept.tokens.parent == axis, f"{kept} does not come from {axis}")
    assert kept.tokens is not None
    return x.with_axes(kept.tokens, *x.axes[1:])


@op(_collect_type)
def collect(x: torch.Tensor, assign: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Sum of the tokens that join each kept one, itself included."""
    return torch.zeros_like(x).index_add_(0, assign, x)[kept]


def _joined_type(assign: Tensor, kept: Tensor) -> Tensor:
    need(kept.tokens is not None and kept.tokens.parent == token_axis(assign), f"{kept} does not come from {assign}")
    return assign


@op(_joined_type)
def joined(assign: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """For every token, the index on the axis of ``kept`` of the token that it was merged into."""
    place = torch.empty_like(assign)
    place[kept] = torch.arange(len(kept))
    return place[assign]


def _ones_type(x: Tensor, *, dtype: str) -> Tensor:
    return Tensor((token_axis(x),), dtype)


@op(_ones_type)
def ones(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
    """A one for every token of the axis of x: each stands for itself."""
    return torch.ones(len(x), dtype=DTYPES[dtype])


def _lift_type(x: Tensor, base: Tensor, sel: Tensor) -> Tensor:
    _restrict_type(base, sel)
    need(token_axis(x) == sel.tokens and x.axes[1:] == base.axes[1:] and x.dtype == base.dtype, f"cannot lift {x} into {base}")
    return base


@op(_lift_type)
def lift(x: torch.Tensor, base: torch.Tensor, sel: torch.Tensor) -> torch.Tensor:
    """``base`` with the tokens that ``sel`` chose replaced by ``x``: back to the parent axis (the others bypass)."""
    return base.index_copy(0, sel, x)


def _unmerge_type(y: Tensor, assign: Tensor, kept: Tensor) -> Tensor:
    need(token_axis(y) == kept.tokens and kept.tokens is not None, f"{y} is not on the axis of {kept}")
    return y.with_axes(token_axis(assign), *y.axes[1:])


@op(_unmerge_type)
def unmerge(y: torch.Tensor, assign: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Every original token gets the row of the token that it was merged into."""
    place = torch.zeros_like(assign)
    place[kept] = torch.arange(len(kept))
    return y[place[assign]]
