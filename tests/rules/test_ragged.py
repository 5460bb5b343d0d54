"""Rule ragged: lengths that differ between sequences are declared."""

from __future__ import annotations

import pytest

from tests.rules.cases import cached, evicting, names, ticking


@pytest.mark.parametrize(("ragged", "legal"), [(False, False), (True, True)])
def test_a_round_that_verifies_leaves_rows_of_different_lengths(ragged: bool, legal: bool) -> None:
    assert names(cached(ragged=ragged)) == (set() if legal else {"ragged"})


@pytest.mark.parametrize(("ragged", "legal"), [(False, False), (True, True)])
def test_rows_tick_at_different_times(ragged: bool, legal: bool) -> None:
    program = ticking(cached(ragged=ragged, keyed_by="explicit"), evicting())
    program.round = None
    assert names(program) == (set() if legal else {"ragged"})


def test_one_length_is_enough_without_rounds_and_ticks() -> None:
    program = cached(ragged=False)
    program.round = None
    assert names(program) == set()
