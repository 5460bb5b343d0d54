"""The launches of dense ops: products with the norm before and the expression after them, and what looks at one token at a
time."""

from __future__ import annotations

import re
from math import prod
from typing import Any

from elision.codegen.planner import Ref
from elision.codegen.refusal import knows, need
from elision.codegen.regions import LINEAR, Products, alone
from elision.codegen.triton.configs import gemv, power, product
from elision.codegen.triton.expression import OPERANDS
from elision.codegen.triton.launches import Arg, Launches, axis, count, integer, piece, plain, real, weight
from elision.ir.ops.program import origin
from elision.ir.types import DTYPES
from elision.ir.value import Value

BEST = 16  # tokens that `topk` gives, at the most
HALF = 2  # slots of weights, and of extras, of a product


def products(to: Launches, region: Products) -> None:
    value, plan = region.result, to.plan
    if value.op == "linear":
        knows(value, LINEAR)
    need(region.a8 == 0, "activations rounded to integers")
    if value.op == "map" and max(len(region.weights), len(region.extras)) > HALF:
        for each in value.args:
            if each.op == "linear" and each not in plan.refs:
                products(to, alone(each))
        return pointwise(to, value, value.attr("expr"))
    need(len(region.x.tensor.features) == 1, "a product of several feature axes")
    source, gain, norm = region.x, None, dict[str, Any]()
    if region.x in plan.tables:
        source = region.x.args[0]
        gain, norm = plain(region.x.args[1]), dict(region.x.attrs)
    x, k = to.whole(source), source.tensor.width
    n = sum(region.weights[0].tensor.sizes[:1])
    out = _result(to, value, n)
    made = [weight(w) for w in region.weights] + [([None, None, None], None)] * (HALF - len(region.weights))
    extras, kinds = [], []
    for extra in region.extras:
        extras.append(plain(extra) if extra.op == "param" else to.whole(extra))
        kinds.append("row" if extra.op == "param" else "tokens")
    names = [f"x{i}" for i in range(len(region.weights))] + [f"x{HALF + i}" for i in range(len(extras))]
    expr = re.sub(r"\bx(\d+)\b", lambda m: names[int(m[1])], region.expr)
    args: dict[str, Arg | None] = {"y": out, "x": x, "g": gain, "eps": real(float(norm.get("eps", 0.0)))}
    args["N"] = integer(n)
    args |= {f"e{i}": extras[i] if i < len(extras) else None for i in range(HALF)}
    for i, (planes, _) in enumerate(made):
        args |= {f"{name}{i}": p for name, p in zip("wdm", planes, strict=True)}
    forms = {f"FORMAT{i}": form.text if form else "" for i, (_, form) in enumerate(made)}
    fixed = dict(
        K=k, **forms, NORM=gain is not None, OFFSET=float(norm.get("offset", 0.0)), KIND0=[*kinds, "", ""][0],
        KIND1=[*kinds, "", ""][1], EPILOGUE={"expression": expr, "operands": OPERANDS},
    )  # fmt: skip
    tokens = plan.axis(source)
    codes = k // max(form.codes for _, form in made if form)
    asks = f"{source.tensor.dtype} {' '.join(filter(None, forms.values()))} {n} {codes}"
    if to.shape == "one":
        tile = to.tile("gemv", asks, gemv(n, codes))
        grid, fixed = (-(-n // tile.n), ("tokens", tokens, 1)), fixed | {"BN": tile.n, "BK": tile.k}
        to.launch("gemv", grid, args, fixed, writes=[out.operand[1]], warps=tile.warps, stages=tile.stages)
    else:
        decoded = any(form.layout for _, form in made if form)
        first = product(to.shape, codes, DTYPES[source.tensor.dtype].itemsize, decoded)
        tile = to.tile("gemm", asks, first)
        grid, fixed = (-(-n // tile.n), ("tokens", tokens, tile.m)), fixed | {"BM": tile.m, "BN": tile.n, "BK": tile.k}
        args["tokens"] = count(tokens)
        to.launch("gemm", grid, args, fixed, writes=[out.operand[1]], warps=tile.warps, stages=tile.stages)


def _result(to: Launches, value: Value, width: int) -> Arg:
    """The buffer of a product; with splits, every part is a slice of it."""
    plan = to.plan
    if not isinstance(value.type, tuple):
        to.new(value)
        return to.tensor(value)[0]
    parts = [v for v in plan.graph.values if v.op == "item" and v.args[0] is value]
    dtype = parts[0].tensor.dtype
    buffer = to.scratch(plan.axis(value.args[0]), width, DTYPES[dtype].itemsize)
    for part in parts:
        plan.refs[part] = Ref(buffer, sum(value.attr("splits")[: part.attr("index")]), (1,), (part.tensor.width,))
    return piece(buffer, dtype)


def norm(to: Launches, value: Value) -> None:
    """By itself, unless nothing but products read it: these normalise what they read."""
    x, *weights = value.args
    attrs = dict(value.attrs)
    users = to.users[value]
    one = len(weights) == 1 and weights[0].op == "param" and len(weights[0].tensor.axes) == 1 and len(x.tensor.features) == 1
    if (
        attrs["kind"] == "rms"
        and one
        and users
        and all(u.op == "linear" and u.args[0] is value and not u.attr("a8", 0) for u in users)
    ):
        to.whole(x)
        to.plan.tables[value] = to.plan.ref(x)
        return
    source, stride = to.tensor(x)
    sizes = [d for d in value.tensor.features if isinstance(d, int)]
    outer, width = prod(sizes[:-1]), sizes[-1]
    gain = 0 if not weights else 2 if len(weights[0].tensor.axes) == 2 else 1
    need(len(weights) < 2 or len(weights[1].tensor.axes) == 1, "a bias of several axes")
    out = to.new(value)
    args = {
        "y": to.tensor(value)[0], "x": source, "x_stride": stride, "g": plain(weights[0]) if weights else None,
        "b": plain(weights[1]) if len(weights) > 1 else None, "eps": real(float(attrs["eps"])),
    }  # fmt: skip
    fixed = dict(
        OUTER=outer, D=width, DP=power(width), KIND=attrs["kind"], OFFSET=float(attrs.get("offset", 0.0)), GAIN=gain,
        BIAS=len(weights) > 1, EARLY=attrs.get("cast", "late") == "early",
    )  # fmt: skip
    grid = (("tokens", to.plan.axis(value), 1), outer)
    to.launch("norm", grid, args, fixed, writes=[out.buffer], warps=4 if width > 512 else 1)


def positions(to: Launches, value: Value) -> None:
    """A table reads them where they are."""
    if value in to.plan.graph.outputs or any(u.op != "embed" for u in to.users[value]):
        _pointwise(to, value, [(axis(to.plan.axis(value), "pos"), integer(1), "single")], "x0")


def embed(to: Launches, value: Value) -> None:
    ids, table = value.args
    planes, form = weight(table)
    k = table.tensor.row
    codes = k // form.codes
    out = to.new(value)
    block = min(1024, power(codes))
    args = {
        "y": to.tensor(value)[0],
        "ids": axis(to.plan.axis(value), "pos") if ids.op == "positions" else to.whole(ids),
        **dict(zip("wdm", planes, strict=True)),
    }
    grid = (("tokens", to.plan.axis(value), 1), -(-codes // block))
    to.launch("embed", grid, args, dict(K=k, FORMAT=form.text, BK=block), writes=[out.buffer])


def restrict(to: Launches, value: Value) -> None:
    x = value.args[0]
    width = prod(d for d in x.tensor.features if isinstance(d, int))
    out = to.new(value)
    args: dict[str, Arg | None] = {"y": to.tensor(value)[0], "x": to.whole(x), "index": axis(to.plan.axis(value), "index")}
    block = min(1024, power(width))
    grid = (("tokens", to.plan.axis(value), 1), -(-width // block))
    to.launch("restrict", grid, args, dict(K=width, BK=block), writes=[out.buffer])


def rope(to: Launches, value: Value) -> None:
    """By itself, unless nothing but an append reads it: that turns the keys on the way."""
    x, freq = value.args
    need(len(x.tensor.features) == 2, "a rotation of other than [tokens, heads, channels]")
    users = to.users[value]
    if users and all(u.op == "append" and u.args[1] is value and u.args[2] is not value and _stays(u) for u in users):
        to.tensor(x)
        to.plan.tables[value] = to.plan.ref(x)
        return
    source, stride = to.tensor(x)
    heads, width = x.tensor.sizes
    out = to.new(value)
    args: dict[str, Arg | None] = {
        "y": to.tensor(value)[0], "x": source, "x_stride": stride, "freq": plain(freq), "pos": axis(to.plan.axis(value), "pos"),
        "factor": real(float(value.attr("scale", 1.0))),
    }  # fmt: skip
    fixed = dict(HEADS=heads, D=width, DP=power(width), R=freq.tensor.width, STYLE=value.attr("style"))
    to.launch("rope", (("tokens", to.plan.axis(value), 1), heads), args, fixed, writes=[out.buffer], warps=1)


def _stays(value: Value) -> bool:
    """Whether a cache is there after the call."""
    return origin(value).op == "input"


def pointwise(to: Launches, value: Value, expr: str) -> None:
    need(len(value.args) <= OPERANDS, "an expression of many operands")
    sizes = [d for d in value.tensor.features if isinstance(d, int)]
    outer, width = prod(sizes[:-1]), sizes[-1] if sizes else 1
    operands = []
    for given in value.args:
        own = [d for d in given.tensor.features if isinstance(d, int)] if given.op != "param" else list(given.tensor.sizes)
        place = (plain(given), integer(0)) if given.op == "param" else to.tensor(given)
        operands.append((*place, _kind(own, sizes, outer, width)))
    _pointwise(to, value, operands, expr)


def ones(to: Launches, value: Value) -> None:
    _pointwise(to, value, [(axis(to.plan.axis(value), "row"), integer(1), "single")], "x0 * 0.0 + 1.0")


def concat(to: Launches, value: Value) -> None:
    sizes = value.tensor.sizes
    outer, place, parts = prod(sizes[:-1]), 0, [(x.tensor.sizes[-1], *to.tensor(x)) for x in value.args]
    out = to.new(value)
    for width, source, stride in parts:
        args: dict[str, Arg | None] = {"y": to.tensor(value)[0], "x": source, "x_stride": stride, "place": integer(place)}
        block = min(1024, power(width))
        grid = (("tokens", to.plan.axis(value), 1), outer, -(-width // block))
        to.launch("concat", grid, args, dict(WIDE=sizes[-1], OUTER=outer, D=width, BD=block), writes=[out.buffer])
        place += width


def results(to: Launches) -> None:
    """What the caller gets lies in memory of its own."""
    for value in to.plan.graph.outputs:
        if value not in to.plan.refs or to.is_whole(value):
            continue
        if not to.plan.refs[value].contiguous:
            to.plan.hosts.append((value.op, "a result with gaps"))
        else:
            _pointwise(to, value, [(*to.tensor(value), "full")], "x0")


def _pointwise(to: Launches, value: Value, operands: list[tuple[Arg, Arg, str]], expr: str) -> None:
    """An expression of operands: addresses, elements from token to token, and how each lies beside the result."""
    sizes = [d for d in value.tensor.features if isinstance(d, int)]
    outer, width = prod(sizes[:-1]), sizes[-1] if sizes else 1
    args: dict[str, Arg | None] = {}
    for i in range(OPERANDS):
        place = operands[i][:2] if i < len(operands) else (None, integer(0))
        args |= dict(zip((f"x{i}", f"s{i}"), place, strict=True))
    kinds = [kind for *_, kind in operands] + [""] * (OPERANDS - len(operands))
    out = to.new(value)
    args["y"] = to.tensor(value)[0]
    block = min(1024, power(width))
    fixed = dict(
        OUTER=outer,
        D=width,
        BD=block,
        **{f"KIND{i}": kind for i, kind in enumerate(kinds)},
        EXPR={"expression": expr, "operands": OPERANDS},
    )
    grid = (("tokens", to.plan.axis(value), 1), outer, -(-width // block))
    to.launch("pointwise", grid, args, fixed, writes=[out.buffer])


def _kind(own: list[int], sizes: list[int], outer: int, width: int) -> str:
    """How an operand's features lie beside the result's."""
    if own == sizes:
        return "full"
    if prod(own) == 1:
        return "single"
    if prod(own) == width == own[-1]:
        return "last"
    need(prod(own) == outer and own[-1:] == [1] and own[:-1] == sizes[:-1], "a broadcast over some of the outer axes")
    return "one"


def best(to: Launches, value: Value) -> None:
    """The indices of the largest logits of each token."""
    x, k = value.args[0], value.attr("k")
    parts = {v.attr("index"): v for v in to.plan.graph.values if v.op == "item" and v.args[0] is value}
    unread = 0 not in parts or not to.users[parts[0]] and parts[0] not in to.plan.graph.outputs
    need(k <= BEST and unread and 1 in parts and len(x.tensor.features) == 1, f"more than the {BEST} best, or their logits")
    width, tokens = x.tensor.width, to.plan.axis(x)
    block = min(4096, power(max(width, k)))
    tiles = -(-width // block)
    values, index = to.scratch(tokens, tiles * k), to.scratch(tokens, tiles * k, 8)
    parted: dict[str, Arg | None] = {"value": piece(values), "index": piece(index, "i64")}
    grid, fixed = (tiles, ("tokens", tokens, 1)), dict(N=width, TILES=tiles, K=k)
    to.launch("best_of_tile", grid, parted | {"x": to.whole(x)}, fixed | {"BN": block}, writes=[values, index])
    out = to.new(parts[1])
    found = parted | {"best": to.tensor(parts[1])[0]}
    to.launch("best_of_tiles", (("tokens", tokens, 1),), found, fixed | {"BT": power(tiles * k)}, writes=[out.buffer], warps=1)
