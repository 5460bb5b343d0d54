"""elision/passes/COMPOSITION.md is what methods on caches compose with (`tests/passes/composition.py`)."""

from __future__ import annotations

import pytest

from tests.passes.composition import METHODS, OTHERS, ROWS, cell, line, pair, pairs, read


def test_the_tables_have_all_methods() -> None:
    kept = read()
    assert set(kept["method"]) == {"", *ROWS} and set(kept["first, then"]) == {"", *METHODS}
    assert kept["method"][""] == tuple(OTHERS) and kept["first, then"][""] == tuple(METHODS)


@pytest.mark.parametrize("row", [row for i, row in enumerate(ROWS) if i % 3 == 0])
def test_a_cell(row: str) -> None:
    """Of some methods with one other pass and one other method each."""
    kept, i = read(), list(ROWS).index(row)
    other, second = list(OTHERS)[i % len(OTHERS)], list(METHODS)[(i + 1) % len(METHODS)]
    assert cell(row, other) == kept["method"][row][list(OTHERS).index(other)]
    if row in METHODS:
        assert pair(row, second) == kept["first, then"][row][list(METHODS).index(second)]


def test_what_is_refused() -> None:
    assert cell("h2o:every=1", "pain-trie") == "refused: retract" == read()["method"]["h2o:every=1"][1]


@pytest.mark.nightly
@pytest.mark.parametrize("row", ROWS)
def test_with_other_passes(row: str) -> None:
    assert line(row)[1:] == read()["method"][row]


@pytest.mark.nightly
@pytest.mark.parametrize("first", METHODS)
def test_with_each_other(first: str) -> None:
    assert pairs(first)[1:] == read()["first, then"][first]
