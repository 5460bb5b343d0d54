"""Rule quality: what the content of a program implies."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.states import Float, Int, Ring, Scratch, Segment
from elision.ir.value import Builder, Value
from tests.ir.programs import tiny_llama
from tests.rules.cases import BODY, DRAFT, WIDE, cached, evicting, names, some, ticking

EIGHT = Int(8, "channel", 16)


def narrow(encoding: Float | Int) -> Program:
    return cached(segments=(Segment(BODY.slots, encoding, encoding), Segment(Scratch(8), encoding, encoding)))


def recoded(encoding: Float | Int) -> Program:
    def edit(b: Builder, rows: Value, states: dict[str, Value]) -> dict[str, Value]:
        return {"kv_0": b.add("recode", states["kv_0"], segment=0, k=encoding, v=encoding)}

    return ticking(cached(segments=(BODY, BODY, DRAFT)), edit)


def ring(window: int) -> Program:
    program = cached(segments=(Segment(Ring(window), WIDE, WIDE), DRAFT))

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        env = (("mask", Mask("window", 8)),)
        return b.add_with(v.op, args, {**dict(v.attrs), "env": env}, None) if v.attr("env") else None

    program.rewrite(rule)
    return program


def on_some(op: str) -> Program:
    """Prefill runs a block of the second layer on some tokens, or on each row's last."""
    program = cached()
    label = "1.mlp" if op == "mlp" else "1.attn"

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
        if v.attr("label") != label:
            return None
        kept = b.add("last", args[0], axis="kept") if op == "last" else some(b, args[0])
        found = b.add("call", b.add("restrict", args[0], kept), *args[1:], **dict(v.attrs))
        h, *states = found if isinstance(found, tuple) else (found,)
        h = b.add("lift", h, args[0], kept)
        return (h, *states) if states else h

    program.rewrite(rule, "prefill")
    return program


CASES: dict[str, tuple[Callable[[], Program], bool]] = {
    "evict": (lambda: ticking(cached(keyed_by="explicit"), evicting()), False),
    "int8 cache": (lambda: narrow(EIGHT), False),
    "bf16 cache": (lambda: narrow(Float("bf16")), True),
    "recode to int8": (lambda: recoded(EIGHT), False),
    "recode to itself": (lambda: recoded(WIDE), True),
    "ring below the window": (lambda: ring(7), False),
    "ring of the window": (lambda: ring(8), True),
    "attention of some tokens": (lambda: on_some("attn"), False),
    "a block of some tokens": (lambda: on_some("mlp"), False),
    "attention of the last tokens": (lambda: on_some("last"), True),
    "plain": (cached, True),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("claimed", ["exact", "distribution"])
def test_lossy_content_is_not_exact(name: str, claimed: str) -> None:
    make, exact = CASES[name]
    program = make()
    program.quality = claimed
    assert ("quality" in names(program)) != exact
    program.quality = "approximate"
    assert "quality" not in names(program)


def test_a_pass_declares_one_of_the_qualities() -> None:
    program, _ = tiny_llama()
    program.quality = "good"
    assert names(program) == {"quality"}
