"""Programs to break: a tiny legal one, and edits of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from elision.ir.program import Program, Tick, round_of
from elision.ir.states import KV, Array, Dense, Float, Scratch, Segment, Undo
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Rule, Value, rewrite
from elision.ir.verifier import check
from elision.passes.cache import with_best
from tests.ir.programs import tiny_llama

WIDE = Float("f64")
BODY, DRAFT = Segment(Dense(), WIDE, WIDE), Segment(Scratch(64), WIDE, WIDE)
Edit = Callable[[Builder, Value, dict[str, Value]], Mapping[str, Value]]


def cached(depth: int = 1, kv_heads: int = 1, **kv: Any) -> Program:
    """A legal program with two layers, whose caches have the fields ``kv`` and whose round can take back ``depth`` tokens."""
    program, _ = tiny_llama(heads=2, kv_heads=kv_heads)
    program.quality = "approximate"
    program.states = {n: replace(t, **kv) for n, t in program.states.items() if isinstance(t, KV)}

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        return b.input(v.attr("name"), program.states[v.attr("name")]) if v.op == "input" and v.is_state else None

    program.rewrite(rule, "prefill", "step")
    program.round = round_of(program, depth)
    return program


def recurrent(undo: Undo | None, depth: int) -> Program:
    """A program with an array state that every token writes."""
    program = Program("recurrent", {"w": Tensor((8, 4), "f32")}, {"x": Array((4,), undo=undo)})
    for entry in ("prefill", "step"):
        b = Builder(entry)
        ids = b.input("ids", Tensor((Axis("t", draft=entry == "step"),), "i64"))
        state = b.input("x", program.states["x"])
        table = b.param("w", program.params["w"])
        h = b.add("embed", ids, table)
        program.entries[entry] = b.build(b.add("linear", h, table), b.add("write", state, h))
    program.entries["step"] = with_best(program.entries["step"], 1, program)
    program.round = round_of(program, depth)
    return program


def ticking(program: Program, edit: Edit, every: int = 16) -> Program:
    """The program with a tick: ``edit(builder, rows, states)`` gives the next values of some of the states."""
    b = Builder("tick")
    rows = b.input("rows", Tensor((Axis("b"),), "i64"))
    states = {n: b.input(n, t) for n, t in program.states.items()}
    program.ticks = (Tick(every, b.build(*{**states, **edit(b, rows, states)}.values())),)
    return program


def evict(b: Builder, rows: Value, state: Value, heads: int = 1, **attrs: Any) -> Value:
    """Keep the four entries of the latest positions."""
    pos = b.add("entries", state, rows)
    kept = b.add("keep", b.add("map", pos, expr="x0", dtype="f32"), pos, n=4)
    kept = b.add("expand", kept, shape=(heads, 4)) if heads > 1 else kept
    return b.add("select", state, kept, rows, **attrs)  # type: ignore[no-any-return]


def evicting(**attrs: Any) -> Edit:
    return lambda b, rows, states: {"kv_0": evict(b, rows, states["kv_0"], **attrs)}


def in_round(program: Program, change: Callable[[Builder, Value, Value], Value]) -> Program:
    """The program with ``change(builder, rows, state)`` on the first cache just before its commit."""
    assert program.round is not None
    known: dict[str, Value] = {}

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op == "input":
            return known.setdefault(v.attr("name"), b.input(v.attr("name"), v.type))  # type: ignore[arg-type]
        if v.op != "commit" or "done" in known:
            return None
        known["done"] = b.add("commit", change(b, known["last"], args[0]), args[1])
        return known["done"]

    program.round = rewrite(program.round, rule, program.targets)
    return program


def template(program: Program, name: str, rule: Rule) -> Program:
    """The program with a template rewritten; what calls it stays."""
    program.templates[name] = rewrite(program.templates[name], rule, program.templates)
    return program


def bypass(program: Program, label: str, *entries: str) -> Program:
    """The program without a block in these entries; its states pass by."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
        if v.op != "call" or v.attr("label") != label:
            return None
        states = tuple(a for a in args if a.is_state)
        return (args[0], *states) if states else args[0]

    program.rewrite(rule, *entries)
    return program


def some(b: Builder, x: Value, axis: str = "kept") -> Value:
    """A selection of some tokens of the axis of ``x [t, n]``."""
    score = b.add("reduce", x, kind="sum")
    return b.add("which", b.add("map", score, expr="x0 > 0", dtype="bool"), axis=axis)  # type: ignore[no-any-return]


def opaque(b: Builder, x: Value) -> Value:
    """``x [t, n]`` through an operator that was not raised."""
    padded = b.add("pad", x)
    done = b.add("aten", padded, function="relu.default", template=(("arg", 0),), results=padded.type)
    return b.add("unpad", x, done)  # type: ignore[no-any-return]


def names(program: Program, **kernels: Any) -> set[str]:
    """The rules that the program breaks."""
    return {v.rule for v in check(program, **kernels)}
