"""Well-formedness of state: one chain of values from input to output."""

from __future__ import annotations

import pytest

from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.states import KV, Dense, Float, Segment
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Value
from elision.ir.verifier import check
from tests.rules.cases import names

TYPE = KV(1, 4, 4, (Segment(Dense(), Float("f32"), Float("f32")),))


def program(order: str) -> Program:
    """A graph over the caches a and b. ``order``: reads (ra) and appends (wa), then the outputs; ' is the value that came in."""
    b = Builder("score")
    x = b.input("x", Tensor((Axis("t"), 1, 4), "f32"))
    first = {n: b.input(n, TYPE) for n in "ab"}
    last: dict[str, Value] = dict(first)
    y = x
    ops, _, outputs = order.partition(" -> ")
    for op in ops.split():
        on_old = op.endswith("'")
        name = op[1]
        state = first[name] if on_old else last[name]
        if op[0] == "r":
            y = b.add("map", y, b.add("attend", x, state, mask=Mask(), scale=0.5), expr="x0 + x1")
        else:
            last[name] = b.add("append", state, y, y)
    found = Program("p", states={"a": TYPE, "b": TYPE})
    found.entries["score"] = b.build(y, *(first[n[0]] if n.endswith("'") else last[n] for n in outputs.split()))
    return found


@pytest.mark.parametrize(
    ("order", "legal"),
    [
        ("wa ra wb rb -> a b", True),
        ("ra wa rb wb -> a b", True),
        ("ra -> a b", True),
        ("wa ra wa ra -> a b", True),
        ("wa ra wa' -> a b", False),  # the input is consumed twice
        ("wa ra' -> a b", False),  # read after the append
        ("wa -> a' b", False),  # the older value comes out
        ("wa wb -> b a", False),  # a call would take one for the other
        ("wa -> a", False),
        ("wa -> a b b", False),
    ],
)
def test_a_state_is_one_chain(order: str, legal: bool) -> None:
    assert names(program(order)) == (set() if legal else {"affine"})


def test_the_message_names_the_ops() -> None:
    (violation,) = check(program("wa ra' -> a b"))
    assert violation.what == "the state a is read after it was consumed"
    assert violation.args[0].splitlines()[1] == "  written by  score: attend after append"


def test_a_state_given_twice_to_a_call() -> None:
    found = program("wa wb -> a b")
    found.templates["inner"] = found.entries["score"]
    b = Builder("score", found.templates)
    x, a, other = b.input("x", Tensor((Axis("t"), 1, 4), "f32")), b.input("a", TYPE), b.input("b", TYPE)
    y, first, _ = b.add("call", x, a, a, target="inner")
    found.entries["score"] = b.build(y, first, other)
    assert "affine" in names(found)
