"""Which kernel computes which op on the CPU, and with which operands. What has no kernel raises NotNative."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from elision.codegen import views
from elision.codegen.cpu import (
    attention_rules,
    expert_rules,
    expression,
    linear,
    linear_a8,
    page_rules,
    quantise,
    rows,
    token_rules,
    topk,
)
from elision.codegen.cpu.integer_dot import best_way
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.planner import Planner, Ref, contiguous
from elision.codegen.refusal import floats, knows, need
from elision.codegen.regions import LINEAR, Products, Region
from elision.ir import schedule as abi
from elision.ir.packing import packing_of
from elision.ir.types import Tensor
from elision.ir.value import Value


class Emitter:
    """Adds the rows of regions to a plan, with kernels from a shared collection, for processors of a feature level."""

    def __init__(self, kernels: Kernels, level: str) -> None:
        self.kernels, self.level, self.way, self.tiles = kernels, level, best_way(level), linear.tiles(level)

    def __call__(self, plan: Planner, region: Region) -> None:
        if isinstance(region, Products):
            self._products(plan, region)
            return
        need(region.op in _RULES, f"{region.op} has no kernel")
        rule, *attributes = _RULES[region.op]
        knows(region, frozenset(attributes))
        if isinstance(region.type, Tensor) and region.op not in ("view", "slice", "pick"):
            need(region.tensor.dtype == "f32", f"{region.tensor.dtype} values")
        rule(self, plan, region)

    def _products(self, plan: Planner, region: Products) -> None:
        value = region.result
        if value.op == "linear":
            knows(value, LINEAR)
        weights = [w.tensor for w in region.weights]
        need(all(w.dtype == "f32" for w in weights), "weights that are not float32")
        need(expression.supported(region.expr), f"no vector code for {region.expr}")
        operands, outer, k = plan.view(plan.ref(region.x))
        need(outer == 1, "a product of three axes")
        packings = [_packing(w) for w in weights]
        packed = [plan.packing(w, p) for w, p in zip(region.weights, packings, strict=True)]
        out = self._result(plan, value, weights[0])
        extras: list[tuple[Any, ...]] = []
        kinds: list[str] = []
        for extra in region.extras:
            if extra.op == "param":
                kinds.append("row")
                extras.append(("tensor", plan.packing(extra, "plain")[1], 0, 0))
            else:
                kinds.append("tokens")
                ref = plan.ref(extra)
                need(ref.contiguous, "an operand with gaps")
                extras.append(plan.tensor(ref))
        count = -(-prod(d for d in weights[0].axes[:1] if isinstance(d, int)) // linear.PANEL)
        x = operands[0]
        scratch: list[int] = []
        formats = [p.partition(":")[2] for p in packings]
        if region.a8:
            x = self._blocks(plan, region.x, operands[0], k)
            key = ("linear_a8", self.way, *formats, k, region.expr, *kinds)
            name = self.kernels.add(key, lambda n: linear_a8.linear(n, self.way, formats, k, region.expr, kinds))
        else:
            key = ("linear", *formats, k, region.expr, *kinds)
            name = self.kernels.add(key, lambda n: linear.linear(n, formats, k, region.expr, kinds, self.tiles))
            if bytes := linear.scratch_bytes(formats, k):
                scratch = [plan.buffer(-1, bytes, private=True)]
                extras.append(("tensor", scratch[0], 0, 4))
        plan.row(
            name, ("axis", plan.axis(value if isinstance(value.type, Tensor) else region.x)), x, plan.tensor(out),
            ("int", count), *packed, *extras, writes=[out.buffer, *scratch],
        )  # fmt: skip

    def _blocks(self, plan: Planner, x: Value, operand: tuple[Any, ...], k: int) -> tuple[Any, ...]:
        """The operand of a value's tokens rounded to int8, which is done once for all products with it."""
        if ("blocks", x) not in plan.tables:
            axis = plan.axis(x)
            found = Ref(plan.buffer(axis, quantise.block_bytes(k)), 0, (1,), (quantise.block_bytes(k),))
            name = self.kernels.add(("quantise", k), lambda n: quantise.quantise(n, k))
            row = [("axis", axis), operand, plan.tensor(found, 1), ("int", plan.share)]
            plan.row(name, *row, writes=[found.buffer])
            plan.tables["blocks", x] = found
        return plan.tensor(plan.tables["blocks", x], 1)

    def _result(self, plan: Planner, value: Value, weight: Tensor) -> Ref:
        """The buffer of a product, whole panels wide; with splits, every part is a slice of it."""
        width = weight.axes[0]
        assert isinstance(width, int)
        bytes = -(-width // linear.PANEL) * linear.PANEL * 4
        if isinstance(value.type, tuple):
            buffer = plan.buffer(plan.axis(value.args[0]), bytes, private=False)
            offset = 0
            for part in (v for v in plan.graph.values if v.op == "item" and v.args[0] is value):
                size = part.tensor.width
                start = sum(value.attr("splits")[: part.attr("index")])
                plan.refs[part] = Ref(buffer, start, (1,), (size,))
                offset += size
            return Ref(buffer, 0, (1,), (width,))
        ref = Ref(plan.buffer(plan.axis(value), bytes, private=False), 0, (1,), (width,))
        plan.refs[value] = ref
        return ref


def _packing(weight: Tensor) -> str:
    """How kernels want a weight in memory. Raises NotNative if it has no panels."""
    found = packing_of(weight.encoding, weight.row)
    need(found is not None, f"rows of {weight.row} weights in {weight.encoding}")
    assert found is not None
    return found


def _embed(emitter: Emitter, plan: Planner, value: Value) -> None:
    ids, table = value.args
    need(ids.tensor.dtype == "i64", f"ids of {ids.tensor.dtype}")
    need(table.tensor.dtype == "f32", "a table that is not float32")
    width, packing = table.tensor.row, _packing(table.tensor)
    format = packing.partition(":")[2]
    name = emitter.kernels.add(("embed", format, width), lambda n: rows.embed(n, format, width))
    packed = plan.packing(table, packing)
    source, out = plan.ref(ids), plan.new(value)
    operands = [("axis", plan.axis(value)), plan.tensor(source, 8), plan.tensor(out), packed, ("int", plan.share)]
    plan.row(name, *operands, writes=[out.buffer])


def _expand(emitter: Emitter, plan: Planner, value: Value) -> None:
    _pointwise(emitter, plan, value, "x0")


def _norm(emitter: Emitter, plan: Planner, value: Value) -> None:
    x, *weights = value.args
    attrs = dict(value.attrs)
    source, outer, size = plan.view(plan.ref(x))
    more: list[tuple[Any, ...]] = []
    for w in weights:
        need(w.tensor.dtype == "f32" and len(w.tensor.axes) <= 2, "a weight of this kind")
        more += [plan.packing(w, "plain"), ("int", size if len(w.tensor.axes) == 2 else 0)]
    out = plan.new(value)
    key = ("norm", size, attrs["kind"], attrs["eps"], attrs.get("offset", 0.0), len(weights))
    name = emitter.kernels.add(key, lambda n: rows.norm(n, *key[1:]))  # type: ignore[arg-type]
    target, *_ = plan.view(out)
    plan.row(
        name, ("axis", plan.axis(value)), *source, *target, ("int", outer), *more, ("int", plan.share), writes=[out.buffer]
    )  # fmt: skip


def _reduce(emitter: Emitter, plan: Planner, value: Value) -> None:
    source, outer, size = plan.view(plan.ref(value.args[0]))
    kind, out = value.attr("kind"), plan.new(value)
    name = emitter.kernels.add(("reduce", size, kind), lambda n: rows.reduce(n, size, kind))
    operands = [*source, plan.tensor(out), ("int", outer), ("int", plan.share)]
    plan.row(name, ("axis", plan.axis(value)), *operands, writes=[out.buffer])


def _rope(emitter: Emitter, plan: Planner, value: Value) -> None:
    x, freq = value.args
    floats(freq)
    half, scale = freq.tensor.width, float(value.attr("scale", 1.0))
    axis = plan.axis(value)
    table = plan.tables.get((freq, scale, axis))
    if table is None:
        table = Ref(plan.buffer(axis, 2 * half * 4), 0, (1,), (2 * half,))
        name = emitter.kernels.add(("rotation", half), lambda n: rows.rotation(n, half))
        operands = [plan.packing(freq, "plain"), ("float", scale), ("int", plan.share)]
        plan.row(name, ("axis", axis), plan.tensor(table), *operands, writes=[table.buffer])
        plan.tables[freq, scale, axis] = table
    source, outer, width = plan.view(plan.ref(x))
    out = plan.new(value)
    target, *_ = plan.view(out)
    style = value.attr("style")
    name = emitter.kernels.add(("rope", half, width, style), lambda n: rows.rope(n, half, width, style))
    plan.row(
        name, ("axis", axis), *source, *target, ("int", outer), plan.tensor(table), ("int", plan.share), writes=[out.buffer]
    )  # fmt: skip


def _map(emitter: Emitter, plan: Planner, value: Value) -> None:
    _pointwise(emitter, plan, value, value.attr("expr"))


def _pointwise(emitter: Emitter, plan: Planner, value: Value, expr: str) -> None:
    need(value.attr("dtype") is None and expression.supported(expr), f"no vector code for {expr}")
    shape = tuple(d for d in value.tensor.features if isinstance(d, int))
    placed = [_broadcast(plan, a, shape) for a in value.args]
    outer, width = prod(shape[:-1]), shape[-1] if shape else 1
    if all(ref.contiguous and ref.shape == shape for ref, _ in placed):
        outer, width = 1, prod(shape)
        placed = [(Ref(r.buffer, r.offset, (1,), (width,)), o) for r, o in placed]
    kinds = ["last" if ref.shape[-1:] == (width,) and width > 1 else "one" for ref, _ in placed]
    sources: list[tuple[Any, ...]] = []
    for ref, operand in placed:
        found, count, _ = plan.view(ref)
        stride = found[1] if count == outer and outer > 1 else ("int", 0)
        need(count in (1, outer), "a broadcast over some of the outer axes")
        sources += [operand or found[0], stride]
    out = plan.new(value)
    target = [plan.tensor(out), ("int", width)]
    name = emitter.kernels.add(("map", width, expr, *kinds), lambda n: rows.pointwise(n, width, expr, kinds))
    plan.row(name, ("axis", plan.axis(value)), *target, ("int", outer), *sources, ("int", plan.share), writes=[out.buffer])


def _broadcast(plan: Planner, arg: Value, shape: tuple[int, ...]) -> tuple[Ref, tuple[Any, ...] | None]:
    """A map operand aligned with the result's features; for a weight the operand that says where it is."""
    need(arg.tensor.dtype == "f32", f"{arg.tensor.dtype} values")
    if arg.op == "param":
        own = arg.tensor.sizes
        ref, operand = Ref(-1, 0, contiguous(own), own), ("tensor", plan.packing(arg, "plain")[1], 0, 0)
    else:
        ref, operand = plan.ref(arg), None
    missing = len(shape) - len(ref.shape)
    need(missing >= 0, "an operand of more axes than the result")
    return Ref(ref.buffer, ref.offset, (0,) * missing + ref.strides, (1,) * missing + ref.shape), operand


def _topk(emitter: Emitter, plan: Planner, value: Value) -> None:
    x, k = value.args[0], value.attr("k")
    floats(x)
    source = plan.ref(x)
    need(source.contiguous and len(source.shape) == 1, "the largest of several rows")
    need(k <= topk.MOST, f"the {k} largest")
    width = source.shape[0]
    parts = {v.attr("index"): v for v in plan.graph.values if v.op == "item" and v.args[0] is value}
    axis = plan.axis(x)
    if 0 in parts:
        values = plan.new(parts[0], private=False)
    else:  # nobody reads the values
        values = Ref(plan.buffer(axis, k * 4, private=False), 0, (1,), (k,))
    need(1 in parts, "the largest without their indices")
    index = plan.new(parts[1], private=False)
    name = emitter.kernels.add(("topk", width, k), lambda n: topk.topk(n, width, k))
    operands = [plan.tensor(source), plan.tensor(values), plan.tensor(index, 8), ("int", abi.SPLIT)]
    plan.row(name, ("axis", axis), *operands, writes=[values.buffer, index.buffer])


def _concat(emitter: Emitter, plan: Planner, value: Value) -> None:
    sources = [plan.view(plan.ref(a)) for a in value.args]
    out = plan.new(value)
    offset = 0
    for source, outer, width in sources:
        name = emitter.kernels.add(("map", width, "x0", "last"), partial(rows.pointwise, width=width, expr="x0", kinds=["last"]))
        part = Ref(out.buffer, offset, (out.shape[-1], 1), (outer, width))
        target = [plan.tensor(part), ("int", out.shape[-1])]
        plan.row(
            name, ("axis", plan.axis(value)), *target, ("int", outer), *source, ("int", plan.share), writes=[out.buffer]
        )  # fmt: skip
        offset += width


#: The rule of an op, and the attributes that it knows.
_RULES: dict[str, tuple[Any, ...]] = {
    "embed": (_embed,),
    "restrict": (lambda emitter, plan, value: token_rules.restrict(emitter.kernels, plan, value),),
    "gather": (lambda emitter, plan, value: token_rules.gather(emitter.kernels, plan, value),),
    "expand": (_expand, "shape"),
    "prepend": (lambda emitter, plan, value: token_rules.prepend(emitter.kernels, plan, value),),
    "norm": (_norm, "kind", "eps", "offset", "cast"),  # of float32 there is nothing to cast
    "reduce": (_reduce, "kind", "keepdim"),
    "rope": (_rope, "style", "scale"),
    "map": (_map, "expr", "dtype"),
    "view": (lambda emitter, plan, value: views.view(plan, value), "shape"),
    "slice": (lambda emitter, plan, value: views.slice_(plan, value), "start", "stop", "axis"),
    "topk": (_topk, "k"),
    "concat": (_concat,),
    "fresh": (lambda emitter, plan, value: attention_rules.fresh(emitter.kernels, plan, value), "type"),
    "empty": (lambda emitter, plan, value: attention_rules.empty(emitter.kernels, plan, value), "type"),
    "append": (lambda emitter, plan, value: attention_rules.append(emitter.kernels, plan, value),),
    "attend": (
        lambda emitter, plan, value: attention_rules.attend(emitter.kernels, emitter.level, plan, value),
        "mask", "scale", "softcap", "extras", "results", "page", "open",
    ),
    "pick": (
        lambda emitter, plan, value: page_rules.pick(emitter.kernels, emitter.level, plan, value),
        "n", "page", "open", "room", "first",
    ),
    "observe": (
        lambda emitter, plan, value: attention_rules.observe(emitter.kernels, emitter.level, plan, value),
        "mask", "scale", "softcap", "extras", "last", "decoding",
    ),
    "route": (
        lambda emitter, plan, value: expert_rules.route(emitter.kernels, plan, value),
        "k", "kind", "renormalise", "eps", "scale", "groups", "top_groups", "group_best",
    ),
    "experts": (lambda emitter, plan, value: expert_rules.experts(emitter.kernels, plan, value), "expr", "halves", "weighted"),
}  # fmt: skip
