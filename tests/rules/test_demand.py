"""Rule demand: results of attention that the kernel gives."""

from __future__ import annotations

import pytest

from elision.ir.program import Program
from elision.ir.states import Ring, Segment
from elision.ir.value import Builder, Value
from tests.rules.cases import DRAFT, WIDE, cached, names, template

LSE_ONLY = {"attend": frozenset({"lse", "per_head"})}


def asking(result: str, program: Program | None = None) -> Program:
    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op != "attend":
            return None
        return b.add("attend", *args, **{**dict(v.attrs), "results": (result,)})[0]  # type: ignore[no-any-return]

    return template(program or cached(), "attn", rule)


@pytest.mark.parametrize(("result", "legal"), [("mass", False), ("lse", True)])
def test_a_kernel_gives_some_results(result: str, legal: bool) -> None:
    assert names(asking(result), kernels=LSE_ONLY) == (set() if legal else {"demand"})


def test_a_kernel_without_results() -> None:
    assert names(asking("lse"), kernels={}) == {"demand"}
    assert names(cached(), kernels={}) == set()


@pytest.mark.parametrize("result", ["mass", "lse"])
def test_the_reference_gives_all_also_of_a_ring(result: str) -> None:
    assert names(asking(result)) == set()
    ring = cached(segments=(Segment(Ring(8), WIDE, WIDE), DRAFT))
    assert names(asking(result, ring)) == set()
