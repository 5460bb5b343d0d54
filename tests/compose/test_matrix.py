"""Every pair of passes is refused, or computes what it should, as elision/passes/composition.json says (`matrix`)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elision.passes import REGISTRY
from tests.compose import kept, matrix
from tests.compose.matrix import SUBJECTS, canonical, compared, refused, verdict
from tests.compose.picture import picture
from tests.compose.settings import SETTINGS

#: Of the pairs that are compiled, how many are run for every change.
SAMPLE = 16


def test_every_registered_pass_has_a_setting() -> None:
    names = {text.partition(":")[0] for setting in SETTINGS.values() for text in setting.passes}
    assert names == {name for name, cls in REGISTRY.items() if cls.__module__.startswith("elision.")}


def test_the_table_has_every_pair_and_the_picture_is_of_it() -> None:
    table = kept.read()
    assert list(table) == list(SUBJECTS)
    for cells in table.values():
        assert set(cells) == set(kept.lists())
        assert {v.partition(" ")[0] for v in cells.values()} <= {*kept.KINDS, "rule", "says"}
    assert kept.PICTURE.read_text(encoding="utf-8") == picture(table["decoder"], "A decoder")


def refusals(name: str, cells: Sequence[matrix.Labels]) -> None:
    table = kept.read()[name]
    for labels in cells:
        if canonical(labels) == labels:
            want = table[labels]
            assert verdict(name, labels, run=False) == (want if want.startswith(("rule", "says")) else "legal"), labels


@pytest.mark.parametrize("name", SUBJECTS)
def test_who_refuses(name: str) -> None:
    """Of the passes that the model can have, and of every third pair of them, whether they are legal and who refuses if not,
    without running any."""
    table = kept.read()[name]
    able = [labels for labels in kept.lists() if not any(table[label,].startswith("says") for label in labels)]
    refusals(name, [*((label,) for label in SETTINGS), *[labels for labels in able if labels[1:]][::3]])


def test_lists_that_are_one_program_are_one_cell() -> None:
    for table in map(kept.read().__getitem__, SUBJECTS):
        assert all(table[canonical(labels)] == verdict for labels, verdict in table.items())


def _sample() -> list[tuple[str, matrix.Labels]]:
    table = kept.read() if kept.KEPT.exists() else {}
    legal = [
        (name, labels)
        for name, cells in table.items()
        for labels, verdict in cells.items()
        if not verdict.startswith(("rule", "says")) and canonical(labels) == labels
    ]
    return legal[7 :: max(1, len(legal) // SAMPLE)]


@pytest.mark.parametrize(("name", "labels"), _sample())
def test_some_pairs_compute_what_they_should(name: str, labels: matrix.Labels) -> None:
    assert verdict(name, labels) == kept.read()[name][labels]


@pytest.mark.nightly
@pytest.mark.parametrize("name", SUBJECTS)
def test_who_refuses_every_pair(name: str) -> None:
    refusals(name, kept.lists())


@pytest.mark.nightly
@pytest.mark.parametrize("first", SETTINGS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_all_pairs_compute_what_they_should(name: str, first: str) -> None:
    table = kept.read()[name]
    for labels in [(first,), *((first, second) for second in SETTINGS)]:
        assert verdict(name, labels) == table[labels], labels


#: Those that are refused alone add nothing.
TRIED = [label for label in SETTINGS if label not in ("tome", "evit", "zero-tprune", "a8")]


@given(st.lists(st.sampled_from(TRIED), min_size=3, max_size=3))
@settings(suppress_health_check=list(HealthCheck), max_examples=min(settings().max_examples // 3, 200))
def test_three_passes(labels: list[str]) -> None:
    """Refused, or what it should be: no rule is one of pairs only."""
    order = canonical(tuple(labels))
    if refused("decoder", order) is None:
        assert compared("decoder", order) in kept.KINDS
