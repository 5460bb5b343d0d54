"""Hypothesis strategies for random legal graphs and programs."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.mask import Mask
from elision.ir.program import Program, Tick
from elision.ir.states import (
    KV,
    Array,
    Budget,
    Dense,
    Float,
    Int,
    Journal,
    Paged,
    Present,
    Repaired,
    Ring,
    Scratch,
    Segment,
    Snapshot,
)
from elision.ir.types import Axis, Host, Tensor
from elision.ir.value import Builder, Env, Graph, Value

names = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
floats = st.floats(allow_nan=True, allow_infinity=True)
encodings = st.one_of(
    st.builds(Float, st.sampled_from(["f64", "f32", "bf16", "f16"])),
    st.builds(Int, st.sampled_from([2, 4, 8]), st.just("channel"), st.sampled_from([4, 8]), st.booleans()),
)
by_blocks = st.builds(Repaired, st.just(Int(4, "channel", 4)), st.integers(4, 9), st.integers(0, 4), st.integers(0, 1))
slots = st.one_of(
    st.just(Dense()),
    st.builds(Ring, st.integers(1, 64), st.integers(0, 4), st.integers(1, 8)),
    st.builds(Budget, st.integers(1, 64)),
    st.builds(Paged, st.integers(1, 64)),
)


@st.composite
def caches(draw: Any) -> KV:
    k, v = draw(encodings), draw(encodings)
    segments = [Segment(Dense(), draw(encodings | by_blocks), draw(encodings), draw(st.booleans()))] * draw(st.integers(0, 1))
    segments.append(Segment(draw(slots), k, v))
    segments += [Segment(Scratch(draw(st.integers(1, 64))), k, v)] * draw(st.integers(0, 1))
    return KV(
        heads=draw(st.integers(1, 4)),
        dim=8,
        vdim=draw(st.sampled_from([8, 16])),
        segments=tuple(segments),
        keyed_by=draw(st.sampled_from(["position", "explicit"])),
        keep=draw(st.sampled_from(["shared", "per_layer", "per_head"])),
        rope=draw(st.sampled_from(["on_write", "on_read"])),
        present=draw(st.builds(Present, st.sampled_from(["all", "nested"]), names)),
        ragged=draw(st.booleans()),
    )


arrays = st.builds(
    Array,
    st.lists(st.integers(1, 4), max_size=2).map(tuple),
    st.sampled_from(["f32", "i64"]),
    st.floats(allow_nan=False),
    st.one_of(st.none(), st.builds(Journal, st.integers(1, 8)), st.just(Snapshot())),
)
masks = st.one_of(
    st.just(Mask("causal")), st.just(Mask("full")), st.builds(Mask, st.sampled_from(["window", "chunk"]), st.integers(1, 99))
)
exprs = st.sampled_from(
    ["x0 + x1", "silu(x0) * x1", "-x0", "x0 * 2.5 + 1e-06", "tanh(x0 / 30.0) * 30.0", "where(x0 > x1, x0, x1)"]
)


def _of(values: list[Value], test: Any) -> list[Value]:
    return [v for v in values if isinstance(v.type, Tensor) and test(v.type)]


def _is_rows(t: Tensor) -> bool:
    return t.tokens is not None and len(t.axes) == 2 and t.dtype == "f32"


@st.composite
def graphs(draw: Any, name: str = "g", env: bool = True) -> Graph:
    """A graph of random ops over one token axis, child axes, weights and states."""
    b = Builder(name)
    axis = Axis(draw(names), draft=draw(st.booleans()))
    values: list[Value] = [b.input("h", Tensor((axis, 16), "f32"))]
    for i in range(draw(st.integers(0, 2))):
        values.append(b.param(f"w.{i}", Tensor((16, 16), "f32")))
    states: list[Value] = []
    if draw(st.booleans()):
        states.append(b.input("kv", draw(caches())))
    for _ in range(draw(st.integers(1, 12))):
        rows = _of(values, _is_rows)
        weights = _of(values, lambda t: t.axes == (16, 16))
        heads = _of(values, lambda t: len(t.axes) == 3)
        x, hint = draw(st.sampled_from(rows)), draw(names)
        kinds = ["norm", "map", "view", "topk", "restrict", "reduce"]
        kinds += ["linear", "split"] * bool(weights) + ["append", "attend"] * bool(states and heads)
        kind = draw(st.sampled_from(kinds))
        try:
            if kind == "norm":
                values.append(b.add("norm", x, kind=draw(st.sampled_from(["rms", "layer"])), eps=draw(floats), name=hint))
            elif kind == "map":
                values.append(b.add("map", x, draw(st.sampled_from(rows)), expr=draw(exprs), name=hint))
            elif kind == "linear":
                values.append(b.add("linear", x, draw(st.sampled_from(weights)), name=hint))
            elif kind == "split":
                values += b.add("linear", x, draw(st.sampled_from(weights)), splits=(4, 12))
            elif kind == "view":
                values.append(b.add("view", x, shape=(2, 8), name=hint))
            elif kind == "topk":
                values += b.add("topk", x, k=draw(st.integers(1, 16)))
            elif kind == "restrict":
                values.append(b.add("restrict", x, b.add("last", x, axis=draw(names)), name=hint))
            elif kind == "reduce":
                values.append(b.add("reduce", x, kind="mean", keepdim=draw(st.booleans()), name=hint))
            elif kind == "append":
                states[-1] = b.add("append", states[-1], draw(st.sampled_from(heads)), draw(st.sampled_from(heads)), name=hint)
            else:
                mask = Env("mask") if env and draw(st.booleans()) else draw(masks)
                results = draw(st.sampled_from([(), ("lse",), ("lse", "mass")]))
                q = draw(st.sampled_from(heads))
                found = b.add("attend", q, states[-1], mask=mask, scale=draw(floats), results=results)
                values += found[:1] if isinstance(found, tuple) else [found]
        except BadInput:
            continue  # the op does not fit these operands
    return b.build(draw(st.sampled_from(_of(values, _is_rows))), *states)


literals = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), floats, st.text(max_size=5)), lambda x: st.tuples(x, x), max_leaves=4
)


@st.composite
def programs(draw: Any) -> Program:
    """A program of a few templates, an entry that calls them, a round and a tick."""
    program = Program(draw(st.text(max_size=8)), meta=draw(st.dictionaries(names, literals, max_size=3)))
    program.applied = tuple(draw(st.lists(st.text(max_size=8), max_size=2)))
    program.quality = draw(st.sampled_from(["exact", "distribution", "approximate"]))
    for i in range(draw(st.integers(1, 3))):
        program.templates[f"part_{i}"] = draw(graphs(f"part_{i}"))
    for graph in program.templates.values():
        program.params.update({v.attr("name"): v.tensor for v in graph.values if v.op == "param"})
    b = Builder("score", program.templates)
    h = b.input("h", Tensor((Axis("t"), 16), "f32"))
    written: list[Value] = []
    for name, graph in program.templates.items():
        given = []
        for i, v in enumerate(graph.inputs[1:]):
            state = f"{name}_{i}"
            program.states[state] = v.type  # type: ignore[assignment]
            given.append(b.input(state, v.type))  # type: ignore[arg-type]
        found = b.add("call", h, *given, target=name, label=f"0.{name}", env=(("mask", draw(masks)),))
        written += found[1:] if isinstance(found, tuple) else []
    program.entries["score"] = b.build(h, *written)
    if draw(st.booleans()):
        r = Builder("round", program.targets)
        last = r.input("last", Tensor((Axis("b"),), "i64"))
        r.input("requests", Host("requests"))
        program.round = r.build(r.add("root", last, axis="d"))
    if draw(st.booleans()):
        t = Builder("tick_0", program.targets)
        rows = t.input("rows", Tensor((Axis("b"),), "i64"))
        state = t.input("s", draw(arrays))
        program.ticks = (Tick(draw(st.integers(1, 64)), t.build(rows, state)),)
    return program
