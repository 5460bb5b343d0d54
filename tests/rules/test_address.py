"""Rule address: indexing by position, sets per head, segments that a cache does not own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elision.ir.states import Ring, Segment
from elision.ir.value import Builder, Value
from tests.rules.cases import BODY, DRAFT, WIDE, cached, evicting, names, ticking

SHARED = replace(BODY, shared=True)
RING = Segment(Ring(8), WIDE, WIDE)


@pytest.mark.parametrize(("keyed_by", "legal"), [("position", False), ("explicit", True)])
def test_eviction_needs_explicit_positions(keyed_by: str, legal: bool) -> None:
    program = ticking(cached(keyed_by=keyed_by), evicting())
    assert names(program) == (set() if legal else {"address"})


@pytest.mark.parametrize(
    ("heads", "keep", "legal"), [(2, "per_layer", False), (2, "shared", False), (2, "per_head", True), (1, "per_layer", True)]
)
def test_sets_per_head_are_declared(heads: int, keep: str, legal: bool) -> None:
    program = ticking(cached(kv_heads=heads, keyed_by="explicit", keep=keep), evicting(heads=heads))
    assert names(program) == (set() if legal else {"address"})


@pytest.mark.parametrize(("features", "legal"), [({"lse"}, False), ({"lse", "per_head"}, True)])
def test_sets_per_head_need_a_kernel(features: set[str], legal: bool) -> None:
    program = ticking(cached(kv_heads=2, keyed_by="explicit", keep="per_head"), evicting())
    assert names(program, kernels={"attend": frozenset(features)}) == (set() if legal else {"address"})


@pytest.mark.parametrize(("segments", "legal"), [((SHARED, RING), False), ((RING,), False), ((SHARED, BODY), True)])
def test_eviction_needs_a_segment_to_evict_from(segments: tuple[Segment, ...], legal: bool) -> None:
    program = ticking(cached(keyed_by="explicit", segments=(*segments, DRAFT)), evicting())
    assert names(program) == (set() if legal else {"address"})


@pytest.mark.parametrize(("segments", "legal"), [((SHARED, BODY), False), ((BODY, RING), False), ((BODY, BODY), True)])
def test_flush_moves_rows_that_the_cache_owns(segments: tuple[Segment, ...], legal: bool) -> None:
    def edit(b: Builder, rows: Value, states: dict[str, Value]) -> dict[str, Value]:
        return {"kv_0": b.add("flush", states["kv_0"], rows, frm=1, to=0, n=4)}

    program = ticking(cached(segments=(*segments, DRAFT)), edit)
    assert names(program) == (set() if legal else {"address"})


@pytest.mark.parametrize(("segment", "legal"), [(SHARED, False), (BODY, True)])
def test_a_shared_segment_is_not_recoded(segment: Segment, legal: bool) -> None:
    def edit(b: Builder, rows: Value, states: dict[str, Value]) -> dict[str, Value]:
        return {"kv_0": b.add("recode", states["kv_0"], segment=0, k=WIDE, v=WIDE)}

    program = ticking(cached(segments=(segment, BODY, DRAFT)), edit)
    assert ("address" in names(program)) != legal
