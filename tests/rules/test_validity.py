"""Rule validity: no read of entries that were never written."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elision.ir.program import Program
from elision.ir.states import KV, Present
from elision.ir.types import Tensor
from elision.ir.value import Builder, Value, rewrite
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
