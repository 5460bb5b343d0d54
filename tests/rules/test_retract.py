"""Rule retract: what a round writes can be taken back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elision.ir.program import Program
from elision.ir.states import Int, Journal, Scratch, Segment, Snapshot, Undo
from elision.ir.types import Axis, Host, Tensor
from elision.ir.value import Builder, Graph, Value
from elision.ir.verifier import check
from tests.rules.cases import BODY, DRAFT, WIDE, cached, evict, evicting, in_round, names, recurrent, ticking

TWO = (BODY, BODY, DRAFT)
CHANGES: dict[str, Callable[[Builder, Value, Value], Value]] = {
    "select": evict,
    "flush": lambda b, rows, s: b.add("flush", s, rows, frm=1, to=0, n=4),
    "recode": lambda b, rows, s: b.add("recode", s, segment=0, k=WIDE, v=WIDE),
}


@pytest.mark.parametrize("op", sorted(CHANGES))
def test_eviction_flush_and_recode_run_on_the_clock_only(op: str) -> None:
    program = in_round(cached(keyed_by="explicit", segments=TWO), CHANGES[op])
    assert names(program) == {"retract"}
    on_the_clock = ticking(
        cached(keyed_by="explicit", segments=TWO), lambda b, rows, states: {"kv_0": CHANGES[op](b, rows, states["kv_0"])}
    )
    assert names(on_the_clock) == set()


@pytest.mark.parametrize(
    ("undo", "depth", "legal"),
    [
        (None, 1, False),
        (Journal(1), 1, True),
        (Journal(3), 4, False),
        (Journal(4), 4, True),
        (Snapshot(), 4, False), (Snapshot(), 1, True),
    ],
)
def test_an_array_needs_an_undo_of_the_rounds_depth(undo: Undo | None, depth: int, legal: bool) -> None:
    assert names(recurrent(undo, depth)) == (set() if legal else {"retract"})


def test_an_array_without_undo_is_legal_outside_of_rounds() -> None:
    program = recurrent(None, 1)
    program.round = None
    assert names(program) == set()


@pytest.mark.parametrize(("scratch", "legal"), [(None, False), (7, False), (8, True)])
def test_a_cache_needs_scratch_of_the_rounds_depth(scratch: int | None, legal: bool) -> None:
    drafts = () if scratch is None else (Segment(Scratch(scratch), WIDE, WIDE),)
    program = cached(depth=8, segments=(BODY, *drafts))
    assert names(program) == (set() if legal else {"retract"})


def _round(program: Program, entry_of_second: str, *, checkpoint: bool = True, commit: bool = True) -> Graph:
    """A round that runs step on the draft, then an entry on ``last``, which is committed."""
    b = Builder("round", program.targets)
    last = b.input("last", Tensor((Axis("b"),), "i64"))
    requests = b.input("requests", Host("requests"))
    states = [b.input(n, t) for n, t in program.states.items()]
    if checkpoint:
        states = [b.add("checkpoint", s, depth=1) for s in states]
    ids = b.add("root", last, axis="d")
    logits, best, *states = b.add("call", ids, *states, target="step")
    paths, nxt = b.add("verify", ids, logits, best, requests, last)
    if entry_of_second == "inside":
        _, *states = b.add("call", last, *states, target="prefill")
    if commit:
        states = [b.add("commit", s, paths) for s in states]
    if entry_of_second == "after":
        _, *states = b.add("call", last, *states, target="prefill")
    return b.build(b.add("emit", ids, paths, nxt), nxt, *states)


@pytest.mark.parametrize(("where", "legal"), [("inside", False), ("after", True)])
def test_committed_rows_are_appended_outside_of_checkpoint_and_commit(where: str, legal: bool) -> None:
    program = cached()
    program.round = _round(program, where)
    assert names(program) == (set() if legal else {"retract"})


@pytest.mark.parametrize(("checkpoint", "commit"), [(True, False), (False, True), (False, False)])
def test_a_round_has_checkpoint_and_commit(checkpoint: bool, commit: bool) -> None:
    program = cached()
    program.round = _round(program, "nowhere", checkpoint=checkpoint, commit=commit)
    assert names(program) == {"retract"}


@pytest.mark.parametrize(("every", "depth", "legal"), [(1, 4, False), (1, 1, True), (16, 4, True), (0, 4, True), (-1, 1, False)])
def test_no_clock_ticks_inside_a_round(every: int, depth: int, legal: bool) -> None:
    program = ticking(cached(depth, keyed_by="explicit"), evicting(), every)
    assert names(program) == (set() if legal else {"retract"})


def test_a_tick_does_not_append() -> None:
    def edit(b: Builder, rows: Value, states: dict[str, Value]) -> dict[str, Value]:
        x = b.add("map", b.add("view", rows, shape=(1, 1)), b.param("ones", Tensor((1, 16), "f64")), expr="x0 * x1", dtype="f64")
        return {"kv_0": b.add("append", states["kv_0"], x, x)}

    program = ticking(cached(), edit)
    program.params["ones"] = Tensor((1, 16), "f64")
    assert names(program) == {"retract"}


def test_the_message_says_how_many_tokens() -> None:
    (violation,) = check(recurrent(Journal(3), 4))
    assert str(violation) == (
        "error[retract]: x cannot take back 4 tokens\n"
        "  written by  round: write, inside the round\n"
        "  because     its journal keeps 3\n"
        "  help        give it undo=Journal(4)"
    )


def test_int_tails_are_drafted_as_they_are_stored() -> None:
    eight = Int(8, "channel", 16)
    assert names(cached(depth=8, segments=(Segment(BODY.slots, eight, eight), Segment(Scratch(8), eight, eight)))) == set()
