"""Every rule of the design's table exists, and says all that a violation must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from elision.errors import IllegalProgram
from elision.ir.cost import cost
from elision.ir.op import Sizes
from elision.ir.program import Program
from elision.ir.states import Int, Journal, Scratch, Segment
from elision.ir.types import Tensor
from elision.ir.verifier import RULES, check, verify
from elision.passes.pipeline import run
from tests.ir.programs import tiny_llama
from tests.rules import test_affine, test_axis, test_demand
from tests.rules.cases import BODY, DRAFT, bypass, cached, evicting, names, recurrent, ticking

EIGHT = Int(8, "channel", 16)
GROUPED = replace(BODY, k=Int(8, "token", 8))
KERNELS: dict[str, frozenset[str]] = {"attend": frozenset({"lse", "per_head"})}


def mistyped() -> Program:
    program = cached()
    program.params["embed"] = Tensor((1, 1), "f64")
    return program


def rounded() -> Program:
    program = cached(segments=(Segment(BODY.slots, EIGHT, EIGHT), Segment(Scratch(8), EIGHT, EIGHT)))
    program.quality = "exact"
    return program


#: For every rule a program that breaks just this one.
BROKEN: dict[str, Callable[[], Program]] = {
    "typed": mistyped,
    "affine": lambda: test_affine.program("wa -> a"),
    "encoding": lambda: ticking(cached(keyed_by="explicit", segments=(GROUPED, BODY, DRAFT)), evicting()),
    "retract": lambda: recurrent(Journal(1), 2),
    "address": lambda: ticking(cached(), evicting()),
    "demand": lambda: test_demand.asking("mass"),
    "axis": lambda: test_axis.at_head(cached(), "prefill", "restrict, opaque then"),
    "validity": lambda: bypass(cached(), "1.attn", "prefill"),
    "rotation": lambda: ticking(cached(keyed_by="explicit"), evicting(renumber=True)),
    "ragged": lambda: cached(ragged=False),
    "quality": rounded,
}


def test_there_is_a_case_for_every_rule() -> None:
    assert {rule.__name__ for rule in RULES} == set(BROKEN)


@pytest.mark.parametrize("rule", BROKEN)
def test_a_violation_says_what_who_why_and_what_to_do(rule: str) -> None:
    found = check(BROKEN[rule](), KERNELS)
    assert {v.rule for v in found} == {rule}
    for violation in found:
        first, *rest = str(violation).splitlines()
        assert first == f"error[{rule}]: {violation.what}" and violation.what
        assert [line[:14] for line in rest] == ["  written by  ", "  because     ", "  help        "]
        assert all(len(line) > 20 for line in rest)


@pytest.mark.parametrize("rule", BROKEN)
def test_verify_names_the_pass_and_those_before_it(rule: str) -> None:
    program = BROKEN[rule]()
    program.applied = ("insert-cache", "skip-layers:layers=1")
    with pytest.raises(IllegalProgram) as caught:
        verify(program, "skip-layers:layers=1", KERNELS)
    assert caught.value.rule == rule
    assert caught.value.sides.startswith("skip-layers:layers=1 (after insert-cache); ")


def test_a_legal_program_passes() -> None:
    program, _ = tiny_llama()
    assert check(program) == []
    verify(program, "insert-cache")


def test_what_is_seen_through_the_round_is_told_once() -> None:
    """The sites of step are reached from step and from the round."""
    program = cached()
    program.quality = "exact"
    assert names(program) == set()
    found = check(test_demand.asking("mass"), KERNELS)
    assert len(found) == 2 * 3  # two layers, in score, prefill and step


def test_passes_can_be_verified_and_counted_after_every_step() -> None:
    """The pipeline's own use: a pass, then its program's verification; the cost model follows the same calls."""
    done = run(tiny_llama()[0], ["skip-layers:layers=1"])
    assert check(done) == []
    labels = {row.label for row in cost(done, "step", Sizes(tokens=1, context=4))}
    assert labels == {"", "0.attn", "0.mlp"}
