"""The coverage report of programs with opaque operators, against counts by hand."""

from __future__ import annotations

import pytest
from programs import tiny_llama, tiny_scorer

from elision.ir.cost import cost, total
from elision.ir.coverage import coverage, is_report, opaque
from elision.ir.op import Sizes
from elision.ir.program import Program
from elision.ir.value import Builder, Value, rewrite
from elision.passes.cache import InsertCache

HIDDEN, INTER, LAYERS = 32, 64, 2


def with_opaque_products() -> Program:
    """The tiny Llama, freshly raised, whose second halves' last product was not raised, and is summed up along the features."""
    program = tiny_scorer(LAYERS, HIDDEN, inter=INTER)[0]

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op != "linear" or args[1].tensor.axes != (HIDDEN, INTER):
            return None
        x = b.add("pad", args[0])
        kind = x.tensor.with_axes(*x.tensor.axes[:2], HIDDEN)
        y = b.add("aten", x, args[1], function="linear.default", template=(("arg", 0), ("arg", 1)), results=kind, rowwise=True)
        z = b.add("aten", y, function="cumsum.default", template=(("arg", 0), -1), results=kind, rowwise=True)
        return b.add("unpad", args[0], z)

    program.templates["mlp"] = rewrite(program.templates["mlp"], rule)
    return program


def test_what_is_left_is_named_by_entry_and_its_arithmetic_counted() -> None:
    raised = with_opaque_products()
    program = raised.copy()
    InsertCache().apply(program)
    found = coverage(raised, program)
    assert found["opaque"] == {"cumsum": LAYERS, "linear": LAYERS} and "pad" not in found["sites"]
    assert found["sites"]["linear"] == LAYERS * 6 + 1 and found["sites"]["aten"] == 2 * LAYERS
    assert found["entries"] == {"score": 4, "prefill": 4, "step": 4}
    assert found["left"] == dict.fromkeys(found["entries"], {"cumsum": LAYERS, "linear": LAYERS})
    rows = cost(program, "step", Sizes(tokens=1, rows=1, context=512))
    assert total(r for r in rows if r.op == "aten").flops == LAYERS * (2 * HIDDEN * INTER + HIDDEN)
    whole = total(cost(tiny_llama(LAYERS, HIDDEN, inter=INTER)[0], "step", Sizes(tokens=1, rows=1, context=512))).flops
    assert found["flops"]["step"] == pytest.approx(1 - LAYERS * (2 * HIDDEN * INTER + HIDDEN) / (whole + LAYERS * HIDDEN))
    assert found["flops"]["prefill"] < 1 and is_report(found)


def test_padded_tokens_count_once() -> None:
    raised = with_opaque_products()
    for tokens, rows in ((1, 1), (12, 3), (64, 1)):
        found = [r for r in cost(raised, "score", Sizes(tokens=tokens, rows=rows, context=64)) if r.op == "aten"]
        assert total(found).flops == tokens * LAYERS * (2 * HIDDEN * INTER + HIDDEN)


def test_an_operator_without_a_rule_for_shapes_counts_its_elements() -> None:
    """`nonzero` gives a tensor whose shape depends on values."""
    b = Builder("score")
    x = b.add("pad", b.input("x", tiny_scorer()[0].templates["mlp"].inputs[0].tensor))
    y = b.add("aten", x, function="nonzero.default", template=(("arg", 0),), results=x.tensor)
    program = Program("p", entries={"score": b.build(y)})
    assert total(cost(program, "score", Sizes(tokens=6))).flops == 6 * HIDDEN
    assert opaque(program, "score") == {"nonzero": 1}


def test_a_raised_program_has_nothing_left() -> None:
    raised, program = tiny_scorer()[0], tiny_llama()[0]
    found = coverage(raised, program)
    assert found["opaque"] == {} and set(found["entries"].values()) == {0} and set(found["flops"].values()) == {1.0}
    assert "call" not in found["sites"] and found["sites"]["attend"] == 2 and is_report(found)
