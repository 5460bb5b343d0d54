"""Violations that are easy to overlook: each program is one small edit away from a legal one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from elision.ir.ops.state import select
from elision.ir.program import Program, Tick, round_of
from elision.ir.states import KV, Array, Dense, Float, Journal, Segment
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Host, Tensor
from elision.ir.value import Builder, Graph, Rule, Value, rewrite
from elision.ir.verifier import check
from tests.ir.programs import tiny_llama

B = Tensor((Axis("b"),), "i64")


def rules(program: Program) -> set[str]:
    return {f.rule for f in check(program)}


def rewritten(rule: Rule) -> Program:
    """The prefill and step of the tiny model rewritten, and the round rebuilt."""
    program, _ = tiny_llama()
    program.rewrite(rule, "prefill", "step")
    program.round = round_of(program)
    return program


def counting(drafted: bool) -> Program:
    """A round that counts in an array, at its last committed tokens or at the drafted ones."""
    program, _ = tiny_llama()
    program.states["count"] = Array((), "i64", undo=Journal(4))
    b = Builder("round", program.targets)
    last, requests = b.input("last", B), b.input("requests", Host("requests"))
    marked = [b.add("checkpoint", b.input(n, t), depth=1) for n, t in program.states.items()]
    ids = b.add("root", last, axis="d")
    count = b.add("write", marked[-1], ids if drafted else last)
    logits, best, *caches = b.add("call", ids, *marked[:-1], target="step")
    paths, nxt = b.add("verify", ids, logits, best, requests, last)
    program.round = b.build(b.add("emit", ids, paths, nxt), nxt, *(b.add("commit", s, paths) for s in [*caches, count]))
    return program


def test_an_undo_holds_only_what_was_drafted() -> None:
    assert check(counting(drafted=True)) == []
    (found,) = check(counting(drafted=False))
    assert found.rule == "retract" and "count" in found.what and "not drafts" in found.because


def recoding(dtype: str) -> Program:
    program, _ = tiny_llama()
    b = Builder("tick", program.targets)
    b.input("rows", B)
    kv = b.input("kv_0", program.states["kv_0"])
    program.ticks = (Tick(16, b.build(b.add("recode", kv, segment=0, k=Float(dtype), v=Float(dtype)))),)
    return program


def test_a_state_comes_back_as_it_is_declared() -> None:
    assert check(recoding("f64")) == []
    (found,) = check(recoding("bf16"))
    assert found.rule == "encoding" and "gives back kv_0" in found.what


def on_read(rotate: bool) -> Program:
    """Caches that rotate keys when they are read; the keys are rotated before as well, or not."""
    program, _ = tiny_llama()
    program.states = {n: replace(t, rope="on_read") for n, t in program.states.items() if isinstance(t, KV)}

    def retype(b: Builder, v: Value, args: tuple[Value, ...]) -> Any:
        if v.op == "input" and isinstance(v.type, KV):
            return b.input(v.attr("name"), replace(v.type, rope="on_read"))
        if v.op == "append" and not rotate:
            return b.add("append", args[0], args[1].args[0], args[2])
        return None

    program.templates = {n: rewrite(g, retype, program.targets) for n, g in program.templates.items()}
    program.rewrite(retype)
    program.round = round_of(program)
    return program


def test_keys_are_rotated_once() -> None:
    assert check(on_read(rotate=False)) == []
    assert rules(on_read(rotate=True)) == {"rotation"}


def test_a_token_sees_itself() -> None:
    program, _ = tiny_llama()
    graph = program.templates["attn"]
    cache = next(v for v in graph.inputs if v.is_state)

    def early(b: Builder, v: Value, args: tuple[Value, ...]) -> Any:
        return b.add("attend", args[0], states[0], **dict(v.attrs)) if v.op == "attend" else None

    def remember(b: Builder, v: Value, args: tuple[Value, ...]) -> Any:
        if v is cache:
            states.append(b.input(v.attr("name"), cache.type))  # type: ignore[arg-type]
            return states[0]
        return early(b, v, args)

    states: list[Value] = []
    found = rewrite(graph, remember)
    late = [v for v in found.values if v.op == "append"]
    program.templates["attn"] = Graph(
        found.name, found.inputs, (*(v for v in found.values if v not in late), *late), found.outputs, found.names
    )
    assert {(f.rule, "before the tokens of the call" in f.what) for f in check(program)} == {("validity", True)}
    declared = {n: replace(t, present=replace(t.present, kind="masked")) for n, t in program.states.items() if isinstance(t, KV)}
    assert declared and all(t.present.kind == "masked" for t in declared.values())


def passing_by(b: Builder, v: Value, args: tuple[Value, ...]) -> Any:
    """Only some tokens go through the second half of each layer."""
    if v.op != "call" or v.attr("target") != "mlp":
        return None
    positive = b.add("reduce", b.add("map", args[0], expr="x0 > 0.0", dtype="bool"), kind="max")
    some = b.add("which", positive, axis=f"some{v.attr('label')[0]}")
    inner = b.add("call", b.add("restrict", args[0], some), *args[1:], target="mlp", label=v.attr("label"))
    return b.add("lift", inner, args[0], some)


def guarded(b: Builder, v: Value, args: tuple[Value, ...]) -> Any:
    """The second half of each layer runs where a flag says so."""
    if v.op != "call" or v.attr("target") != "mlp":
        return None
    return b.add("when", b.param("flag", Tensor((), "bool")), *args, target="mlp")


def test_leaving_out_work_is_not_exact() -> None:
    for rule in (passing_by, guarded):
        program = rewritten(rule)
        if rule is guarded:
            program.params["flag"] = Tensor((), "bool")
        assert rules(program) == {"quality"}
        program.quality = "approximate"
        assert check(program) == []


def test_renumbering() -> None:
    """Semantics of ``renumber``: what is kept has the positions 0, 1, .. of its order."""
    type = KV(1, 2, 2, (Segment(Dense()),), keyed_by="explicit", rope="on_read")
    store = KVStore(type, 2, 8)
    rows = torch.zeros(6, 1, 2)
    store.append(Tokens.chunk([4, 2], [0, 0]), rows, rows)
    kept = torch.tensor([[[0, 2, 3]]])
    select(store, kept, torch.tensor([0]), renumber=True)
    assert store.positions()[:, 0, :4].tolist() == [[0, 1, 2, -1], [0, 1, -1, -1]]
    select(store, torch.tensor([[[1]]]), torch.tensor([1]))
    assert store.positions()[:, 0, :2].tolist() == [[0, 1], [1, -1]]
