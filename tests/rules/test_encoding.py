"""Rule encoding: whole token groups, and one type for reader and writer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elision.ir.states import KV, Budget, Int, Segment
from elision.ir.value import Builder, Value
from elision.ir.verifier import check
from tests.rules.cases import BODY, DRAFT, WIDE, cached, evicting, names, ticking

BY_TOKEN, BY_CHANNEL = Int(4, "token", 4, zero=True), Int(4, "channel", 4, zero=True)


@pytest.mark.parametrize(("encoding", "legal"), [(BY_TOKEN, False), (BY_CHANNEL, True), (WIDE, True)])
def test_single_entries_are_not_evicted_from_token_groups(encoding: Int, legal: bool) -> None:
    segments = (replace(BODY, k=encoding), BODY, DRAFT)
    program = ticking(cached(keyed_by="explicit", segments=segments), evicting())
    assert names(program) == (set() if legal else {"encoding"})


@pytest.mark.parametrize(
    ("n", "what", "legal"), [(8, "kv", True), (6, "kv", False), (6, "k", False), (6, "v", True), (4, "k", True)]
)
def test_flush_moves_whole_groups(n: int, what: str, legal: bool) -> None:
    def edit(b: Builder, rows: Value, states: dict[str, Value]) -> dict[str, Value]:
        return {"kv_0": b.add("flush", states["kv_0"], rows, frm=1, to=0, n=n, what=what)}

    program = ticking(cached(segments=(Segment(BODY.slots, BY_TOKEN, WIDE), BODY, DRAFT)), edit)
    assert names(program) == (set() if legal else {"encoding"})


def test_a_state_has_the_type_that_the_program_declares() -> None:
    """A pass that bounds a cache in the table of states only, not in the graphs that take it."""
    program = cached()
    kv = program.states["kv_1"]
    assert isinstance(kv, KV)
    program.states["kv_1"] = kv.with_segment(0, replace(BODY, slots=Budget(8)))
    assert names(program) == {"encoding"}
    assert {v.what for v in check(program)} == {
        f"{run} takes kv_1 as another type than the program declares" for run in ("prefill", "step", "round")
    }
    del program.states["kv_1"]
    assert names(program) == {"encoding"}


@pytest.mark.parametrize("change", [{"heads": 2}, {"dim": 8}, {"vdim": 8}])
def test_reader_and_writer_agree_on_the_rows(change: dict[str, int]) -> None:
    assert names(cached(**change)) >= {"encoding"}
