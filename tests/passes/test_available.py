"""Which passes cannot act on a program, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from programs import tiny_llama, tiny_scorer

from elision.errors import BadInput
from elision.ir.mask import Mask
from elision.ir.printer import print_program
from elision.ir.program import Program
from elision.ir.value import Builder, Value
from elision.passes import REGISTRY, InsertCache, Pass
from elision.passes.available import unavailable


@dataclass(frozen=True)
class Picky(Pass):
    """Acts on nothing."""

    name: ClassVar[str] = "picky"
    family: ClassVar[str] = "test"
    changes: ClassVar[str] = "tokens"

    def apply(self, program: Program) -> None:
        raise BadInput("picky: there is nothing that I like")


@dataclass(frozen=True)
class DropsVerifiedTokens(Pass):
    """Restricts the step to its last token, which verify may not be without. It has a field without a default."""

    count: int

    name: ClassVar[str] = "drops"
    family: ClassVar[str] = "test"
    changes: ClassVar[str] = "tokens"

    @classmethod
    def example(cls, program: Program) -> DropsVerifiedTokens:
        return cls(len(program.layers))

    def apply(self, program: Program) -> None:
        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v.op != "norm":
                return None
            rows = b.add("restrict", args[0], b.add("last", args[0], axis="kept"))
            return b.add_with("norm", (rows, *args[1:]), dict(v.attrs), None)

        program.rewrite(rule, "step")


def test_reasons_come_from_the_pass_or_from_the_rule_it_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    program = tiny_llama()[0]
    before = print_program(program)
    assert unavailable(program).keys() & {"skip-layers:layers=0", "clean", "insert-cache"} == {"insert-cache"}
    monkeypatch.setitem(REGISTRY, "picky", Picky)
    monkeypatch.setitem(REGISTRY, "drops", DropsVerifiedTokens)
    found = unavailable(program)
    assert found["picky"] == "picky: there is nothing that I like"
    assert found["drops:count=2"].startswith("rule axis: ")
    assert print_program(program) == before, "trying a pass changed the program"


def test_a_pass_that_was_applied_is_not_tried_again() -> None:
    program = tiny_llama()[0]
    program.applied = (InsertCache("bf16").text(),)
    assert "insert-cache" not in unavailable(program)


def test_an_encoder_has_no_cache_to_insert() -> None:
    program = tiny_scorer(mask=Mask("full"))[0]
    assert "it is an encoder" in unavailable(program)["insert-cache"]


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_pass_has_an_example(name: str) -> None:
    step = REGISTRY[name].example(tiny_llama()[0])
    assert isinstance(step, REGISTRY[name])
