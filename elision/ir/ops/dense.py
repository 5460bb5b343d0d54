"""Dense ops on token-major activations ``[tokens, ...]``: everything that looks at one token at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from elision.ir import expr as scalar
from elision.ir.integers import rounded
from elision.ir.op import Cost, Sizes, need, op, token_axis
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES, Tensor, parse_dtype
from elision.ir.weights import GROUP, Encoded, decoded, integer_groups

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def _linear_type(x: Tensor, w: Tensor, b: Tensor | None = None, *, splits: tuple[int, ...] = (), a8: int = 0) -> Any:
    need(len(w.axes) == 2, f"a weight is [out, in], got {w}")
    fits = a8 == GROUP and integer_groups(w.encoding, w.row)
    need(a8 == 0 or fits, f"a8={a8} with the weight {w}; expected a8={GROUP} and integers with a scale per {GROUP}")
    out, width = w.axes
    need(x.axes[-1] == width, f"the last axis of {x} is not the {width} inputs of the weight {w}")
    need(x.dtype == w.dtype, f"{x.dtype} activations with {w.dtype} weights")
    need(b is None or b.axes == (out,), f"expected a bias [{out}], got {b}")
    if not splits:
        return x.with_axes(*x.axes[:-1], out)
    need(sum(splits) == out, f"splits {splits} do not add up to {out}")
    return tuple(x.with_axes(*x.axes[:-1], s) for s in splits)


def _linear_cost(sizes: Sizes, types: list[Tensor], result: Any, attrs: dict[str, Any]) -> Cost:
    x, w = types[0], types[1]
    out, width = (sizes.of(d) for d in w.axes)
    rows = sizes.elements(x) // width
    read = {i: float(sizes.bytes(t)) for i, t in enumerate(types)}
    return Cost(2.0 * rows * out * width, read, float(rows * out * x.itemsize))


@op(_linear_type, cost=_linear_cost, encoded=(1,))
def linear(
    x: torch.Tensor, w: torch.Tensor | Encoded, b: torch.Tensor | None = None, *, splits: tuple[int, ...] = (), a8: int = 0
) -> Tensors:
    """``x [.., in] @ w [out, in].T + b [out]``; ``splits`` cuts the result into several along ``out``.

    ``a8=32``: every 32 channels of x are first rounded to int8 with a scale of their own (`elision.ir.integers.rounded`), so
    that products with integer weights are sums of integers.
    """
    y = F.linear(rounded(x, a8) if a8 else x, decoded(w), b)
    return torch.split(y, list(splits), dim=-1) if splits else y


def _matmul_type(a: Tensor, b: Tensor) -> Tensor:
    axis = token_axis(a, b)
    need(len(a.axes) >= 3 and len(b.axes) >= 2, "expected a [t, .., m, k] and b [t, .., k, n] or [k, n]")
    lead = b.axes[:-2]
    fits = not lead or (len(lead) == len(a.axes) - 2 and all(y in (1, x) for x, y in zip(a.axes, lead, strict=False)))
    need(fits and a.axes[-1] == b.axes[-2] and a.dtype == b.dtype, f"cannot multiply {a} and {b}")
    return a.with_axes(axis, *a.axes[1:-1], b.axes[-1])


def _matmul_cost(sizes: Sizes, types: list[Tensor], result: Tensor, attrs: dict[str, Any]) -> Cost:
    read = {i: float(sizes.bytes(t)) for i, t in enumerate(types)}
    return Cost(2.0 * sizes.elements(result) * sizes.of(types[0].axes[-1]), read, float(sizes.bytes(result)))


@op(_matmul_type, cost=_matmul_cost)
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product of two activations, per token: ``[t, .., m, k] @ [t, .., k, n]``."""
    return torch.matmul(a, b)


def _norm_type(x: Tensor, *weights: Tensor, kind: str, eps: float, offset: float = 0.0, cast: str = "late") -> Tensor:
    need(kind in ("rms", "layer", "l2"), f"kind {kind!r}; expected rms, layer or l2")
    need(cast in ("early", "late"), f"cast {cast!r}; expected early or late")
    need(len(weights) <= 2, "expected at most a weight and a bias")
    for w in weights:
        need(w.axes == x.axes[-len(w.axes) :], f"a weight {w} does not fit the last axes of {x}")
    return x


def _pointwise_cost(sizes: Sizes, types: list[Tensor], result: Tensor, attrs: dict[str, Any]) -> Cost:
    per = scalar.flops(attrs["expr"]) if "expr" in attrs else 5
    read = {i: float(sizes.bytes(t)) for i, t in enumerate(types)}
    return Cost(float(per * sizes.elements(result)), read, float(sizes.bytes(result)))


@op(_norm_type, cost=_pointwise_cost)
def norm(
    x: torch.Tensor,
    w: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    *,
    kind: str,
    eps: float,
    offset: float = 0.0,
    cast: str = "late",
) -> torch.Tensor:
    """Normalise the last axis, then ``* (w + offset) + b``; statistics in float32 at least.

    ``rms``: ``x * rsqrt(mean(x^2) + eps)``; ``layer``: the same after subtracting the mean; ``l2``: ``x * rsqrt(sum(x^2)
    + eps)``.
    ``cast``: where a half-precision model goes back to its dtype: before the weight (``early``) or after it (``late``).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    square = wide.pow(2)
    moment = square.sum(-1, keepdim=True) if kind == "l2" else square.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(moment + eps)
    if cast == "early":
        y = y.to(x.dtype)
    if w is not None:
        scale = w if cast == "early" else w.to(y.dtype)
        y = y * (scale + offset if offset else scale)
    if b is not None:
        y = y + b.to(y.dtype)
    return y.to(x.dtype)


def _rope_type(x: Tensor, inv_freq: Tensor, *, style: str, scale: float = 1.0) -> Tensor:
    token_axis(x)
    need(style in ("half", "interleaved", "parted"), f"style {style!r}; expected half, interleaved or parted")
    need(len(inv_freq.axes) == 1 and isinstance(inv_freq.axes[0], int), f"expected inv_freq [dim/2], got {inv_freq}")
    dim, width = inv_freq.axes[0], x.axes[-1]
    need(isinstance(dim, int) and isinstance(width, int) and 2 * dim <= width, f"{inv_freq} rotates more than {width} channels")
    return x


@op(_rope_type, cost=_pointwise_cost)
def rope(x: torch.Tensor, inv_freq: torch.Tensor, *, style: str, scale: float = 1.0, at: Tokens) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021, RoFormer) of ``x [t, heads, dim]`` at the tokens' positions.

    Channels ``i`` and ``i + r`` (``half``) or ``2i`` and ``2i + 1`` (``interleaved``) turn by ``pos * inv_freq[i]``, r =
    len(inv_freq); channels from ``2r`` on stay. ``parted`` turns the pairs of ``interleaved`` and puts them where ``half`` has
    them (DeepSeek-V3 in transformers). ``scale`` multiplies cosine and sine (YaRN's attention factor).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angle = at.pos.to(wide)[:, None] * inv_freq.to(wide)[None, :]
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (angle.shape[-1],)
    cos = (angle.cos() * scale).to(x.dtype).view(shape)
    sin = (angle.sin() * scale).to(x.dtype).view(shape)
    r = inv_freq.shape[0]
    turn, rest = x[..., : 2 * r], x[..., 2 * r :]
    a, b = (turn[..., :r], turn[..., r:]) if style == "half" else (turn[..., 0::2], turn[..., 1::2])
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if style == "interleaved" else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _embed_type(ids: Tensor, table: Tensor) -> Tensor:
    need(ids.dtype in ("i64", "i32") and len(table.axes) == 2, f"expected ids and a table [vocab, width], got {ids}, {table}")
    return table.with_axes(*ids.axes, table.axes[1])


def _embed_cost(sizes: Sizes, types: list[Tensor], result: Tensor, attrs: dict[str, Any]) -> Cost:
    ids, table = types
    rows = float(sizes.bytes(table)) * sizes.elements(ids) / sizes.of(table.axes[0])
    return Cost(0.0, {0: float(sizes.bytes(ids)), 1: rows}, float(sizes.bytes(result)))


@op(_embed_type, cost=_embed_cost, encoded=(1,))
def embed(ids: torch.Tensor, table: torch.Tensor | Encoded) -> torch.Tensor:
    """The rows of ``table [vocab, width]`` at ``ids [t]``; of an encoded table only these are decoded."""
    return table[ids] if isinstance(table, Encoded) else F.embedding(ids, table)


def _positions_type(x: Tensor) -> Tensor:
    return Tensor((token_axis(x),), "i64")


@op(_positions_type)
def positions(x: torch.Tensor, *, at: Tokens) -> torch.Tensor:
    """The absolute positions ``i64[t]`` of the axis of ``x`` (for learned position tables)."""
    return at.pos


def _map_type(*types: Tensor, expr: str, dtype: str | None = None) -> Tensor:
    need(expr == scalar.canonical(expr), f"{expr!r} is not canonical; write {scalar.canonical(expr)!r}")
    need(scalar.operands(expr) <= len(types), f"{expr!r} reads more than {len(types)} operands")
    shape: list[Any] = []
    for t in types:
        axes = list(t.axes)
        if len(axes) > len(shape):
            shape, axes = axes, shape
        for i in range(1, len(axes) + 1):
            have, more = shape[-i], axes[-i]
            need(have == more or have == 1 or more == 1, f"cannot broadcast {', '.join(map(str, types))}")
            shape[-i] = more if have == 1 else have
    kinds = {t.dtype for t in types}
    need(len(kinds) == 1 or dtype is not None, f"operands of dtypes {', '.join(sorted(kinds))} need dtype=")
    return Tensor(tuple(shape), parse_dtype(dtype or kinds.pop()))


@op(_map_type, cost=_pointwise_cost, name="map")
def map_(*x: torch.Tensor, expr: str, dtype: str | None = None) -> torch.Tensor:
    """One scalar expression of ``x0, x1, ..`` for every element (see `elision.ir.expr`), broadcast on the right."""
    y = scalar.compiled(expr)(*x)
    return y.to(DTYPES[dtype] if dtype else x[0].dtype)


def _reduce_type(x: Tensor, *, kind: str, keepdim: bool = False) -> Tensor:
    need(kind in ("sum", "mean", "max"), f"kind {kind!r}; expected sum, mean or max")
    need(len(x.axes) > 1 and isinstance(x.axes[-1], int), f"no feature axis to reduce in {x}")
    return x.with_axes(*x.axes[:-1], *((1,) if keepdim else ()))


@op(_reduce_type, cost=_pointwise_cost)
def reduce(x: torch.Tensor, *, kind: str, keepdim: bool = False) -> torch.Tensor:
    """Sum, mean or maximum over the last feature axis."""
    return x.amax(-1, keepdim) if kind == "max" else getattr(x, kind)(-1, keepdim=keepdim)


def _view_type(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    size = 1
    for n in shape:
        size *= n
    need(size == x.width, f"{x} has {x.width} elements per token, not {size}")
    return x.with_axes(token_axis(x), *shape)


def _free(sizes: Sizes, types: list[Tensor], result: Any, attrs: dict[str, Any]) -> Cost:
    return Cost()


@op(_view_type, cost=_free)
def view(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    """The features of every token in another shape."""
    return x.reshape(x.shape[0], *shape)


def _expand_type(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    axis = token_axis(x)
    fits = len(shape) == len(x.features) and all(n > 0 and have in (1, n) for have, n in zip(x.features, shape, strict=True))
    need(fits, f"cannot repeat the features of {x} to {shape}")
    return x.with_axes(axis, *shape)


@op(_expand_type, cost=_free)
def expand(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    """Features of size 1 repeated to ``shape`` (one key part for all heads, say), without a copy."""
    return x.expand(-1, *shape)


def _slice_type(x: Tensor, *, start: int, stop: int, axis: int = -1) -> Tensor:
    need(-len(x.features) <= axis < 0, f"axis={axis}; expected -1 to {-len(x.features)}, counted from the last of {x}")
    size = x.axes[axis]
    need(isinstance(size, int) and 0 <= start < stop <= size, f"no channels {start}:{stop} in axis {axis} of {x}")
    axes = list(x.axes)
    axes[axis] = stop - start
    return x.with_axes(*axes)


@op(_slice_type, cost=_free, name="slice")
def slice_(x: torch.Tensor, *, start: int, stop: int, axis: int = -1) -> torch.Tensor:
    """Channels ``start .. stop - 1`` of a feature axis (counted from the last, -1)."""
    return x.narrow(axis, start, stop - start)


def _concat_type(*types: Tensor) -> Tensor:
    need(len(types) > 0 and all(t.axes[:-1] == types[0].axes[:-1] and t.dtype == types[0].dtype for t in types), "shapes differ")
    return types[0].with_axes(*types[0].axes[:-1], sum(d for t in types if isinstance(d := t.axes[-1], int)))


@op(_concat_type)
def concat(*x: torch.Tensor) -> torch.Tensor:
    """The channels of all operands, one after the other, in the last axis."""
    return torch.cat(x, dim=-1)


def _gather_type(x: Tensor, index: Tensor) -> Tensor:
    need(index.dtype == "i64" and len(index.axes) == 1, f"expected an index i64[n], got {index}")
    return x.with_axes(index.axes[0], *x.axes[1:])


@op(_gather_type)
def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of ``x [m, ..]`` at ``index [n]`` (as a result on the index's own axis)."""
    return x[index]


def topk_type(x: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    last = x.axes[-1]
    need(not isinstance(last, int) or 1 <= k <= last, f"k={k} of the {last} elements in {x}")
    axes = (*x.axes[:-1], k)
    return x.with_axes(*axes), Tensor(axes, "i64")


@op(topk_type)
def topk(x: torch.Tensor, *, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last axis and their indices, in descending order; ties go to the smaller index."""
    if k == 1:
        best = x.argmax(-1, keepdim=True)
        return x.gather(-1, best), best
    order = torch.sort(x, dim=-1, descending=True, stable=True)
    return order.values[..., :k], order.indices[..., :k]
