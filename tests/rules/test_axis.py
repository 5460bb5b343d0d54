"""Rule axis: verified tokens, merging, opaque operators."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elision.errors import IllegalProgram
from elision.ir.mask import Mask
from elision.ir.op import OPS
from elision.ir.program import Program, round_of
from elision.ir.value import Builder, Value, rewrite
from elision.ir.verifier import verify
from tests.ir.programs import tiny_scorer
from tests.rules.cases import cached, names, opaque, some


def at_head(program: Program, entry: str, change: str) -> Program:
    """The entry with its stream changed before the head."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op != "norm":
            return None
        x, *weights = args
        if "opaque first" in change:
            x = opaque(b, x)
        if "restrict" in change or "lift" in change:
            kept = some(b, x)
            part = b.add("restrict", x, kept)
            if "opaque then" in change:
                part = opaque(b, part)
            x = b.add("lift", part, x, kept) if "lift" in change else part
        elif "opaque then" in change:
            x = opaque(b, x)
        return b.add("norm", x, *weights, **dict(v.attrs))  # type: ignore[no-any-return]

    program.rewrite(rule, entry)
    return program


@pytest.mark.parametrize(("change", "legal"), [("restrict", False), ("lift", True)])
def test_verify_reads_every_drafted_token(change: str, legal: bool) -> None:
    program = at_head(cached(), "step", change)
    assert ("axis" in names(program)) != legal
    if not legal:
        with pytest.raises(IllegalProgram, match=r"the logits of step are on draft\(t\)/kept"):
            verify(program)


def test_prefill_may_drop_tokens() -> None:
    assert names(at_head(cached(), "prefill", "restrict")) == set()


@pytest.mark.parametrize(
    ("change", "legal"),
    [
        ("restrict, opaque then", False),
        ("lift, opaque then", False),
        ("opaque first, restrict", True),
        ("opaque then", True),  # on each row's last token
    ],
)
def test_an_opaque_operator_sees_all_tokens_of_a_call(change: str, legal: bool) -> None:
    assert names(at_head(cached(), "prefill", change)) == (set() if legal else {"axis"})


@pytest.mark.parametrize(("mask", "legal"), [(Mask(), False), (Mask("window", 4), False), (Mask("full"), True)])
def test_tokens_are_merged_in_encoders_only(mask: Mask, legal: bool) -> None:
    program, _ = tiny_scorer(mask=mask)
    program.quality = "approximate"

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.attr("label") != "1.attn":
            return None
        x, *weights = args
        assign = b.add("positions", x)
        weight = b.add("map", assign, expr="x0 * 0 + 1", dtype="f64")
        kept = b.add("clusters", assign, axis="merged")
        done = b.add("call", b.add("merge", x, assign, weight, kept), *weights, **dict(v.attrs))
        return b.add("unmerge", done, assign, kept)  # type: ignore[no-any-return]

    program.rewrite(rule, "score")
    assert names(program) == (set() if legal else {"axis"})


@pytest.mark.parametrize(("maker", "raised", "legal"), [("forest", False, False), ("root", False, True), ("forest", True, True)])
def test_an_opaque_operator_sees_no_trees(maker: str, raised: bool, legal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``forest`` stands for any op that drafts more than the root."""
    monkeypatch.setitem(OPS, "forest", replace(OPS["root"], name="forest"))
    program = cached() if raised else at_head(cached(), "step", "opaque then")
    program.round = round_of(program, depth=4)

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        return b.add(maker, *args, **dict(v.attrs)) if v.op == "root" else None  # type: ignore[no-any-return]

    program.round = rewrite(program.round, rule, program.targets)
    assert names(program) == (set() if legal else {"axis"})


@pytest.mark.parametrize("again", ["kept", "other"])
def test_an_axis_is_made_once(again: str) -> None:
    """Two selections under one name: what is on the first would be read at the tokens of the second."""
    program, _ = tiny_scorer()
    program.quality = "approximate"

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op != "norm":
            return None
        x, *weights = args
        for until, axis in ((4, "kept"), (2, again)):
            kept = b.add("before", x, until=until, axis=axis)
            x = b.add("lift", b.add("restrict", x, kept), x, kept)
        return b.add("norm", x, *weights, **dict(v.attrs))  # type: ignore[no-any-return]

    program.rewrite(rule, "score")
    assert names(program) == ({"axis"} if again == "kept" else set())
