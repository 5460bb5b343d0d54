"""Mixture of experts: which experts each token goes to, and the experts themselves (Shazeer et al. 2017)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from elision.ir import expr as scalar
from elision.ir.op import Cost, Sizes, need, op, token_axis
from elision.ir.ops.dense import topk, topk_type
from elision.ir.types import Tensor
from elision.ir.weights import Encoded


def _route_type(x: Tensor, *, k: int, kind: str = "softmax", renormalise: bool = True) -> tuple[Tensor, Tensor]:
    need(kind in ("softmax", "sigmoid"), f"kind {kind!r}; expected softmax or sigmoid")
    return topk_type(x, k=k)


@op(_route_type)
def route(x: torch.Tensor, *, k: int, kind: str = "softmax", renormalise: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights ``[t, k]`` and expert indices ``[t, k]`` from router logits ``[t, experts]``.

    Probabilities by softmax or sigmoid in float32 at least; those of the k largest logits, ties to the smaller index, made to
    sum to 1 if ``renormalise`` (Mixtral renormalises, Switch does not). Logits are compared, since probabilities saturate.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    p = wide.softmax(-1) if kind == "softmax" else wide.sigmoid()
    index = topk(wide, k=k)[1]
    weight = p.gather(-1, index)
    if renormalise:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight.to(x.dtype), index


def _experts_type(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    up: Tensor,
    down: Tensor,
    *biases: Tensor,
    expr: str,
    halves: bool = True,
    weighted: str = "output",
) -> Tensor:
    axis = token_axis(x, weight, index)
    need(weighted in ("input", "output"), f"weighted {weighted!r}; expected input or output")
    need(len(up.axes) == len(down.axes) == 3, f"expected up [experts, F, in] and down [experts, out, F'], got {up}, {down}")
    (count, wide, width), (others, out, inner) = up.axes, down.axes
    need(count == others and width == x.axes[-1] and len(x.axes) == 2, f"{up} and {down} do not fit {x}")
    assert isinstance(inner, int)
    need(wide == inner * scalar.operands(expr), f"{expr!r} of {wide} channels does not give {inner}")
    need(weight.axes == index.axes and len(index.axes) == 2 and index.dtype == "i64", f"expected [t, k] twice: {weight}, {index}")
    need(
        [b.axes for b in biases] in ([], [(count, wide), (count, out)]), "expected no biases, or [experts, F] and [experts, out]"
    )
    return x.with_axes(axis, out)


def _experts_cost(sizes: Sizes, types: list[Tensor], result: Tensor, attrs: dict[str, Any]) -> Cost:
    x, weight, _, up, down = types[:5]
    count, wide, width = (sizes.of(d) for d in up.axes)
    _, out, inner = (sizes.of(d) for d in down.axes)
    pairs = sizes.elements(weight)
    used = min(count, pairs) / count  # experts that nobody is sent to are not read
    read = {i: float(sizes.bytes(t)) for i, t in enumerate(types)}
    read[3], read[4] = read[3] * used, read[4] * used
    return Cost(2.0 * pairs * (wide * width + out * inner), read, float(sizes.bytes(result)))


@op(_experts_type, cost=_experts_cost, encoded=(3, 4))
def experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    up: torch.Tensor | Encoded,
    down: torch.Tensor | Encoded,
    *biases: torch.Tensor,
    expr: str,
    halves: bool = True,
    weighted: str = "output",
) -> torch.Tensor:
    """``sum_j weight[t, j] * down[e] f(up[e] x)`` with ``e = index[t, j]``: ``x [t, in]``, ``up [experts, F, in]``,
    ``down [experts, out, F']``; ``sum_j down[e] f(up[e] (weight[t, j] * x))`` if ``weighted`` is ``input`` (Llama 4).

    ``biases``: of both products, or none. ``expr`` is f over the parts of the first product: its channels in as many
    equal runs as the expression has operands (``halves``), or interleaved.
    """
    y = x.new_zeros(x.shape[0], down.shape[1])
    parts = scalar.operands(expr)
    for e in dict.fromkeys(index.flatten().tolist()):
        token, place = (index == e).nonzero(as_tuple=True)
        gate = weight[token, place][:, None]
        h = F.linear(x[token] * gate if weighted == "input" else x[token], up[e], *(b[e] for b in biases[:1]))
        cut = h.chunk(parts, -1) if halves else tuple(h[..., i::parts] for i in range(parts))
        out = F.linear(scalar.compiled(expr)(*cut), down[e], *(b[e] for b in biases[1:]))
        y.index_add_(0, token, out if weighted == "input" else out * gate)
    return y
