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


def _route_type(
    x: Tensor,
    *bias: Tensor,
    k: int,
    kind: str = "softmax",
    renormalise: bool = True,
    eps: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_best: int = 1,
) -> tuple[Tensor, Tensor]:
    need(kind in ("softmax", "sigmoid"), f"kind {kind!r}; expected softmax or sigmoid")
    experts = x.axes[-1]
    need(isinstance(experts, int) and len(x.axes) == 2, f"expected logits [t, experts], got {x}")
    assert isinstance(experts, int)
    need(len(bias) <= 1 and all(b.axes == (experts,) for b in bias), f"expected at most one bias [{experts}]")
    need(groups >= 1 and experts % groups == 0, f"{experts} experts cannot be cut into {groups} groups")
    need(1 <= top_groups <= groups, f"top_groups={top_groups} of {groups} groups")
    need(1 <= group_best <= experts // groups, f"group_best={group_best} of the {experts // groups} experts of a group")
    need(k <= top_groups * (experts // groups), f"k={k} experts from {top_groups} groups of {experts // groups}")
    return topk_type(x, k=k)


@op(_route_type)
def route(
    x: torch.Tensor,
    *bias: torch.Tensor,
    k: int,
    kind: str = "softmax",
    renormalise: bool = True,
    eps: float = 0.0,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    group_best: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights ``[t, k]`` and expert indices ``[t, k]`` from router logits ``[t, experts]``.

    Probabilities by softmax or sigmoid in float32 at least; those of the k best experts, ties to the smaller index, divided by
    their sum ``+ eps`` if ``renormalise`` (Mixtral renormalises, Switch does not), times ``scale``.
    A ``bias [experts]`` is added to choose, not to weigh (Wang et al. 2024, arXiv:2408.15664); without one logits are compared,
    since probabilities saturate. Of ``groups`` equal runs of experts only ``top_groups`` are chosen from, those with the largest
    sums of their ``group_best`` best experts (DeepSeek-V3, arXiv:2412.19437, section 2.1.2; DeepSeek-V2 has the best alone).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    p = wide.softmax(-1) if kind == "softmax" else wide.sigmoid()
    worth = p + bias[0] if bias else p
    chosen_by = worth if bias else wide
    if groups > top_groups:
        parts = worth.reshape(*p.shape[:-1], groups, -1)
        kept = topk(topk(parts, k=group_best)[0].sum(-1), k=top_groups)[1]
        out = torch.ones_like(parts[..., 0], dtype=torch.bool).scatter(-1, kept, False)
        chosen_by = chosen_by.reshape(parts.shape).masked_fill(out[..., None], -torch.inf).flatten(-2)
    index = topk(chosen_by, k=k)[1]
    weight = p.gather(-1, index)
    if renormalise:
        weight = weight / (weight.sum(-1, keepdim=True) + eps)
    return (weight * scale).to(x.dtype), index


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

    The sum is taken in the dtype of the weights, if that is the wider one.
    ``biases``: of both products, or none. ``expr`` is f over the parts of the first product: its channels in as many
    equal runs as the expression has operands (``halves``), or interleaved.
    """
    y = x.new_zeros(x.shape[0], down.shape[1], dtype=torch.promote_types(x.dtype, weight.dtype))
    parts = scalar.operands(expr)
    for e in dict.fromkeys(index.flatten().tolist()):
        token, place = (index == e).nonzero(as_tuple=True)
        gate = weight[token, place][:, None]
        h = F.linear(x[token] * gate if weighted == "input" else x[token], up[e], *(b[e] for b in biases[:1]))
        cut = h.chunk(parts, -1) if halves else tuple(h[..., i::parts] for i in range(parts))
        out = F.linear(scalar.compiled(expr)(*cut), down[e], *(b[e] for b in biases[1:]))
        y.index_add_(0, token, (out if weighted == "input" else out * gate).to(y.dtype))
    return y.to(x.dtype)
