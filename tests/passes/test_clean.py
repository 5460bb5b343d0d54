"""Dead code and equal values go, unused weights, states and templates go, and no result changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_llama

from elision.ir.canonical import canonical
from elision.ir.interp import run_entry
from elision.ir.program import Program
from elision.ir.tokens import Tokens
from elision.ir.types import Tensor
from elision.ir.value import Builder, Graph, Value, copy_value, rewrite
from elision.passes import Clean
from elision.passes.pipeline import run

PROGRAM, WEIGHTS = tiny_llama()
IDS = torch.randint(0, 64, (7,), generator=torch.Generator().manual_seed(0))


def logits(program: Program) -> torch.Tensor:
    found: torch.Tensor = run_entry(program, WEIGHTS, "score", IDS, Tokens.chunk([4, 3], [0, 0]), {})
    return found


def littered(graph: Graph, program: Program, choices: st.DataObject) -> Graph:
    """The graph with values that nobody reads, chains of them, and values that are there twice."""
    dead: list[Value] = []

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op in ("input", "param", "item") or not isinstance(v.type, Tensor) or v.type.dtype != "f64":
            return None
        found = copy_value(b, v, args, graph.names.get(v))
        for _ in range(choices.draw(st.integers(0, 2))):
            of = choices.draw(st.sampled_from([found, *[d for d in dead if d.type == found.type]]))
            dead.append(b.add("map", of, expr=choices.draw(st.sampled_from(["x0 * 2.0", "exp(x0)", "x0 + x0"]))))
        return found

    kept = rewrite(graph, rule, program.targets, more=lambda: dead, keep=True)
    return Graph(kept.name, kept.inputs, kept.values, kept.outputs[: len(graph.outputs)], kept.names)


@given(st.data())
def test_dead_values_go_and_results_stay(data: st.DataObject) -> None:
    program = PROGRAM.copy()
    for table in (program.templates, program.entries):
        for name in list(table):
            table[name] = littered(table[name], program, data)
    before = sum(len(g.values) for g in program.targets.values())
    clean = run(program, [])
    assert canonical(clean) == canonical(run(PROGRAM, [])) and torch.equal(logits(clean), logits(PROGRAM))
    assert sum(len(g.values) for g in clean.targets.values()) <= before
    assert clean.applied == program.applied, "the clean-up is no method"


@pytest.mark.parametrize("op", ["norm", "linear", "map"])
def test_a_value_computed_twice_is_computed_once(op: str) -> None:
    program = PROGRAM.copy()
    graph = program.templates["mlp"]
    twin = {v: Value(v.op, v.args, v.attrs, v.type) for v in graph.values if v.op == op}  # equal, and another object

    def other(v: Value) -> Value:
        return twin.get(v, v)

    values = [x for v in graph.values for x in ((v, twin[v]) if v in twin else (v,))]
    last = values[-1]
    product = Value("map", (other(last) if last in twin else last, last), (("expr", "x0 + x1"),), last.type)
    program.templates["mlp"] = Graph("mlp", graph.inputs, (*values, product), (product,), {**graph.names, product: "out"})
    Clean().apply(program)
    found = program.templates["mlp"]
    assert len(found.values) == len(graph.values) + 1


def test_what_no_entry_uses_is_dropped() -> None:
    program = PROGRAM.copy()
    program.params["spare"] = Tensor((3,), "f64")
    program.templates["spare"] = Graph("spare", (), (), (), {})
    program.states["kv_9"] = program.states["kv_0"]
    Clean().apply(program)
    assert set(program.params) == set(PROGRAM.params) and set(program.templates) == {"attn", "mlp"}
    assert set(program.states) == set(PROGRAM.states)
