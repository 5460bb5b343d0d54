"""The launches of a mixture of experts: the choice, two products of every pair of token and expert, their sum."""

from __future__ import annotations

from typing import Any

from elision.codegen.refusal import need
from elision.codegen.triton.configs import gemv, power
from elision.codegen.triton.launches import Arg, Launches, piece, plain, real, weight
from elision.ir.expr import operands
from elision.ir.types import DTYPES
from elision.ir.value import Value


def route(to: Launches, value: Value) -> None:
    x = value.args[0]
    parts = {v.attr("index"): v for v in to.plan.graph.values if v.op == "item" and v.args[0] is value}
    attrs = dict(value.attrs)
    need(
        len(parts) == 2 and attrs.get("groups", 1) == attrs.get("top_groups", 1),
        "experts in groups, or a part that nothing reads",
    )
    weights, index = to.new(parts[0]), to.new(parts[1])
    args: dict[str, Arg | None] = {
        "weight": to.tensor(parts[0])[0], "index": to.tensor(parts[1])[0], "x": to.whole(x),
        "bias": plain(value.args[1]) if len(value.args) > 1 else None, "eps": real(float(attrs.get("eps", 0.0))),
        "scale": real(float(attrs.get("scale", 1.0))),
    }  # fmt: skip
    n = x.tensor.width
    fixed = dict(
        N=n, NP=power(n), K=attrs["k"], KIND=attrs.get("kind", "softmax"), RENORMALISE=bool(attrs.get("renormalise", True)),
        BIASED=len(value.args) > 1,
    )  # fmt: skip
    grid = (("tokens", to.plan.axis(x), 1),)
    to.launch("route", grid, args, fixed, writes=[weights.buffer, index.buffer], warps=1)


def experts(to: Launches, value: Value) -> None:
    x, gate, index, up, down, *biases = value.args
    plan, expr, on_input = to.plan, value.attr("expr"), value.attr("weighted", "output") == "input"
    parts = operands(expr)
    need(not biases and parts <= 2 and (parts == 1 or value.attr("halves", True)), "experts with biases, or interleaved")
    count, wide, width = up.tensor.sizes
    _, out, inner = down.tensor.sizes
    picked, tokens, dtype = index.tensor.sizes[0], plan.axis(value), value.tensor.dtype
    hidden = to.scratch(tokens, picked * inner, DTYPES[dtype].itemsize)
    partial = to.scratch(tokens, picked * out, DTYPES[dtype].itemsize)
    gates, chosen = to.whole(gate), to.whole(index)

    def product(y: int, source: Arg, w: Value, n: int, k: int, shared: bool, weighted: bool, of: int, expression: str) -> None:
        planes, form = weight(w)
        codes = k // form.codes
        tile = to.tile("expert_gemv", f"{dtype} {form.text} {n} {codes}", gemv(n, codes))
        args: dict[str, Arg | None] = {
            "y": piece(y, dtype), "x": source, "gate": gates if weighted else None, "index": chosen,
            **dict(zip("wdm", planes, strict=True)),
        }  # fmt: skip
        fixed: dict[str, Any] = dict(
            N=n, K=k, FORMAT=form.text, EXPERTS=count, PICKED=picked, SHARED=shared, WEIGHTED=weighted, PARTS=of,
            EXPR={"expression": expression, "operands": 2}, BN=tile.n, BK=tile.k,
        )  # fmt: skip
        to.launch("expert_gemv", (("tokens", tokens, 1, picked), -(-n // tile.n)), args, fixed, writes=[y], warps=tile.warps)

    product(hidden, to.whole(x), up, inner, width, True, on_input, parts, expr)
    product(partial, piece(hidden, dtype), down, out, inner, False, False, 1, "x0")
    ref = to.new(value)
    block = min(1024, power(out))
    mixed: dict[str, Arg | None] = {"y": to.tensor(value)[0], "x": piece(partial, dtype), "gate": gates if not on_input else None}
    grid = (("tokens", tokens, 1), -(-out // block))
    to.launch("mixed", grid, mixed, dict(N=out, PICKED=picked, WEIGHTED=not on_input, BN=block), writes=[ref.buffer])
