"""Rule typed: graphs that were not rebuilt after what they call has changed."""

from __future__ import annotations

from dataclasses import replace

from elision.ir.program import Program, round_of
from elision.ir.types import Tensor
from elision.ir.value import Builder, Value, rewrite
from elision.ir.verifier import check
from tests.ir.programs import tiny_llama


def narrowed() -> Program:
    """Its step gives half precision, and its round does not know."""
    program, _ = tiny_llama()
    step = program.entries["step"]
    logits = step.outputs[0]

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v is not logits:
            return None
        found = b.add("map", b.add_with(v.op, args, dict(v.attrs), None), expr="x0", dtype="bf16")
        assert isinstance(found, Value)
        return found

    program.entries["step"] = rewrite(step, rule, program.targets)
    return program


def test_a_round_that_was_not_rebuilt() -> None:
    program = narrowed()
    (found,) = check(program)
    lines = str(found).splitlines()
    assert lines[:2] == ["error[typed]: call of step has another type in round", "  written by  round: call of step"]
    assert "bf16[draft(d), 64]" in found.because and "f64[draft(d), 64]" in found.because
    program.round = round_of(program)
    assert check(program) == []


def test_a_parameter_of_another_type() -> None:
    program, _ = tiny_llama()
    program.params["norm"] = Tensor((32,), "f32")
    found = check(program)
    assert {f.rule for f in found} == {"typed"} and "param 'norm'" in found[0].what
    assert "f32[32]" in found[0].because and "f64[32]" in found[0].because
    del program.params["norm"]
    assert "no such parameter" in check(program)[0].because


def test_operands_that_do_not_fit() -> None:
    """A template that takes one operand more than its callers give."""
    program, _ = tiny_llama()
    graph = program.templates["mlp"]
    builder = Builder("mlp")
    more = builder.input("more", Tensor((32,), "f64"))
    wider = replace(graph, inputs=(*graph.inputs, more), values=(*graph.values, more), names={**graph.names, more: "more"})
    assert check(program) == []
    program.templates["mlp"] = wider
    found = check(program)
    assert {f.rule for f in found} == {"typed"} and "takes 6 operands, got 5" in found[0].because
