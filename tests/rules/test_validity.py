"""Rule validity: no read of entries that were never written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elision.ir.program import Program, round_of
from elision.ir.states import KV, Present
from elision.ir.types import Tensor
from elision.ir.value import Builder, Value, rewrite
from elision.ir.verifier import check
from elision.passes.layers.depth import without
from elision.passes.speculate.model import _drafts
from tests.rules.cases import bypass, cached, names, some, template

KINDS = [("all", False), ("subset", True), ("nested", True), ("masked", True)]


@pytest.mark.parametrize(("present", "legal"), KINDS)
def test_tokens_that_skip_a_cache_are_declared(present: str, legal: bool) -> None:
    """Prefill runs the second layer's attention on some tokens only."""
    program = cached(present=Present(present))

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> tuple[Value, ...] | None:
        if v.attr("label") != "1.attn":
            return None
        kept = some(b, args[0])
        h, kv = b.add("call", b.add("restrict", args[0], kept), *args[1:], **dict(v.attrs))
        return b.add("lift", h, args[0], kept), kv

    program.rewrite(rule, "prefill")
    assert names(program) == (set() if legal else {"validity"})


@pytest.mark.parametrize(("present", "legal"), KINDS)
def test_an_append_that_may_not_happen_is_declared(present: str, legal: bool) -> None:
    program = cached(present=Present(present))
    attn = program.templates["attn"]
    append = next(v for v in attn.values if v.op == "append")
    assert isinstance(append.type, KV)
    b = Builder("store")
    kv, k, v = b.input("kv", append.type), b.input("k", append.args[1].tensor), b.input("v", append.args[2].tensor)
    program.templates["store"] = b.build(b.add("append", kv, k, v))
    program.params["flag"] = Tensor((), "bool")

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        flag = b.param("flag", Tensor((), "bool"))
        return b.add("when", flag, *args, target="store") if v.op == "append" else None  # type: ignore[no-any-return]

    assert names(template(program, "attn", rule)) == (set() if legal else {"validity"})


@pytest.mark.parametrize(("without", "legal"), [(["prefill"], False), (["step"], True), (["prefill", "step"], True), ([], True)])
def test_what_step_reads_was_written_by_prefill(without: list[str], legal: bool) -> None:
    assert names(_without(without)) == (set() if legal else {"validity"})


def _without(entries: list[str]) -> Program:
    program = cached()
    return bypass(program, "1.attn", *entries) if entries else program


@pytest.mark.parametrize(("present", "legal"), KINDS)
def test_what_step_reads_was_written_by_step(present: str, legal: bool) -> None:
    """The second layer of step attends to its cache without appending to it."""
    program = cached(present=Present(present))
    attn = program.templates["attn"]

    def reads(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        return args[0] if v.op == "append" else None

    program.templates["reader"] = rewrite(replace(attn, name="reader"), reads)

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> tuple[Value, ...] | None:
        if v.attr("label") != "1.attn":
            return None
        return b.add("call", *args, **{**dict(v.attrs), "target": "reader"})  # type: ignore[no-any-return]

    program.rewrite(rule, "step")
    assert names(program) == (set() if legal else {"validity"})


@pytest.mark.parametrize(
    ("left", "present", "draft", "says"),
    [
        ([[], [1]], "nested", False, None),
        ([[], [1]], "all", False, "present=nested"),
        ([[1], []], "nested", False, "never less"),
        ([[], [1]], "nested", True, "draft from tables"),
    ],
)
def test_steps_of_a_round_leave_out_more_and_more(left: list[list[int]], present: str, draft: bool, says: str | None) -> None:
    """The round runs one step up to position 8, and another one from there on."""
    program = cached(present=Present(present))
    step = program.entries["step"]
    names_ = ("step", "step_1")
    for name, layers in zip(names_, left, strict=True):
        program.entries[name] = without(program, step, layers, name)
    if draft:
        program.entries["draft"] = _drafts(step, "draft")
    program.round = round_of(program, run=("staged", {"targets": names_, "until": (8,)}))
    found = [f for f in check(program) if f.rule == "validity"]
    assert [says in str(f) for f in found if says] == [True] * bool(says) and bool(found) == bool(says)
