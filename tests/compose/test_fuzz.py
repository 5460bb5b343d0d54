"""Random lists of passes are refused by name or compute what the interpreter does; damaged artefacts are refused. By night for
ten minutes, for every change the first few of the same."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elision.ir.coverage import coverage
from tests.compose import fuzz
from tests.compose.mutations import Opener, damage, members
from tests.compose.subjects import decoder

LISTS, ARTEFACTS = 420.0, 180.0  # seconds of a night
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@given(st.sampled_from(["decoder", "encoder"]), fuzz.lists)
@settings(max_examples=12, derandomize=True, **QUIET)
def test_lists_of_passes(name: str, texts: list[str]) -> None:
    fuzz.outcome(name, texts)


@pytest.mark.nightly
def test_lists_of_passes_for_minutes() -> None:
    until, seen = time.monotonic() + LISTS, Counter[str]()

    @given(st.sampled_from(fuzz.MODELS), fuzz.lists)
    @settings(max_examples=20_000, database=None, **QUIET)
    def search(name: str, texts: list[str]) -> None:
        if time.monotonic() < until:
            seen[fuzz.outcome(name, texts)] += 1

    search()
    print(sum(seen.values()), dict(seen))
    assert seen["equal"] and seen["tokens"] and any(kind.startswith("rule") for kind in seen)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With native code, a clock, encoded weights and a drafter."""
    path = tmp_path_factory.mktemp("fuzz") / "intact.elision"
    program, weights = decoder().transformed(["h2o:budget=24,recent=8", "int8", "token-recycling:nodes=20"])
    model = decoder().model(program, weights, native=True)
    model.coverage = coverage(decoder().program, program)
    model.save(path)
    return path


@pytest.fixture(scope="module")
def opener() -> Iterator[Opener]:
    found = Opener()
    yield found
    found.close()


def damaged(artefact: Path, opener: Opener, seed: int) -> str:
    """What became of it. Fails for a crash, for an error that is not ours, and for bytes of the file that changed unseen."""
    intact = artefact.read_bytes()
    path = artefact.with_name("damaged.elision")
    done = damage(intact, members(artefact), path, seed)
    said = opener(path)
    assert said in ("refused", "ran"), f"seed {seed}, {done}: {said}"
    if said == "ran":  # a manifest that says something else, or the same again, under digests that are right
        assert path.read_bytes() == intact or set(done.split("+")) <= EDITS, f"seed {seed}: {done} was not seen"
    return said


#: Changes under new digests that can give another artefact that is legal.
EDITS = {"tabled", "headed", "edited"}


def test_the_intact_artefact_runs(artefact: Path, opener: Opener) -> None:
    assert opener(artefact) == "ran"


def test_damaged_artefacts(artefact: Path, opener: Opener) -> None:
    assert Counter(damaged(artefact, opener, seed) for seed in range(60))["refused"] > 50


@pytest.mark.nightly
def test_damaged_artefacts_for_minutes(artefact: Path, opener: Opener) -> None:
    until, seed = time.monotonic() + ARTEFACTS, 1000
    while time.monotonic() < until:
        damaged(artefact, opener, seed)
        seed += 1
    print(seed - 1000, "damaged artefacts")
