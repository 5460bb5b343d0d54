"""The search of how much of a prompt layers need: schedules, budgets, what is found says itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elision
from elision.errors import BadInput
from elision.ir.canonical import canonical
from elision.passes import from_text
from elision.passes.tokens.g_search import cut_layers, greedy, sigmoid
from tests.passes.small import ROOM, tiny


@functools.cache
def original() -> Any:
    return tiny(num_hidden_layers=6, initializer_range=0.15)


def text() -> torch.Tensor:
    return torch.randint(1, 64, (3, ROOM), generator=torch.Generator().manual_seed(2))


@functools.cache
def searched(settings: str) -> elision.Model:
    return elision.compile(original(), passes=[settings], target="reference", calibration=text())


def found(model: elision.Model) -> Any:
    return from_text(model.program.applied[-1])


@given(st.integers(4, 40), st.integers(1, 6), st.floats(0.3, 0.95), st.sampled_from([4.0, 8.0, 16.0]))
def test_sigmoids_meet_their_budget(count: int, steps: int, budget: float, slope: float) -> None:
    layers = list(range(count))
    cuts = cut_layers(layers, steps)
    assert len(cuts) == min(steps, count - 2) and cuts[0] == 2
    keep = sigmoid(layers, cuts, budget, slope)
    if keep:
        assert list(keep) == sorted(keep, reverse=True) and all(1 <= k <= 100 for k in keep)
        seen = [next((k for c, k in reversed(list(zip(cuts, keep, strict=True))) if c <= i), 100) for i in layers]
        assert sum(seen) / count / 100 < budget + 0.02
        assert keep[-1] == 100 or sum(seen) / count / 100 > budget - 0.02
        more = sigmoid(layers, cuts, min(budget + 0.1, 1.0), slope)
        assert all(a <= b for a, b in zip(keep, more, strict=True))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_greedy_finds_the_smallest(least: list[int]) -> None:
    """Where all is good as long as no share is below a least of its own, each is the least of all up to there that may follow."""
    asked = 0

    def good(keep: tuple[int, ...]) -> bool:
        nonlocal asked
        asked += 1
        return all(k >= 5 * n for k, n in zip(keep, least, strict=True))

    keep = greedy(len(least), good)
    assert keep == tuple(5 * max(least[i:]) for i in range(len(least)))
    assert asked <= 5 * len(least)


def test_a_budget_is_searched_and_said() -> None:
    model = searched("g-search:budget=0.6,steps=3")
    step = found(model)
    assert step.layers == (2, 3, 4) and len(step.keep) == 3
    seen = [100, 100, step.keep[0], step.keep[1], step.keep[2], step.keep[2]]
    assert abs(sum(seen) / 600 - 0.6) < 0.02
    again = elision.compile(original(), passes=[step], target="reference")
    assert canonical(again.program) == canonical(model.program)
    ids = text()[:1, :40]
    assert torch.equal(again.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))


def test_less_divergence_keeps_more() -> None:
    some, more = found(searched("g-search:eps=0.05,steps=2")), found(searched("g-search:eps=0.0001,steps=2"))
    assert all(a <= b for a, b in zip(some.keep, more.keep, strict=True)) and sum(some.keep) < sum(more.keep)


def test_the_identity() -> None:
    plain = elision.compile(original(), target="reference").program
    for settings in ("g-search:budget=1.0", "g-search:layers=2+4,keep=100+100"):
        assert canonical(elision.compile(original(), passes=[settings], target="reference").program) == canonical(plain)


def test_one_cut_is_fastv() -> None:
    one, other = (elision.compile(original(), passes=[p]) for p in ("g-search:layers=3,keep=40", "fastv:layer=3,keep=0.4"))
    ids = text()[:2, :50]
    assert torch.equal(one.generate(ids, max_new_tokens=20), other.generate(ids, max_new_tokens=20))


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_caches_hold_less_and_less(target: str) -> None:
    from elision.runtime.session import Session

    model = elision.compile(original(), passes=["g-search:layers=1+3+5,keep=80+50+30"], target=target)
    session = Session(model._interpreter, 1, 60)
    with torch.inference_mode():
        session.prefill([text()[0, :50].tolist()])
    assert [int(session._stores[f"kv_{i}"].totals()[0, 0]) for i in range(6)] == [50, 40, 40, 25, 25, 15]
    sets = [set(session._stores[f"kv_{i}"].positions()[0, 0].tolist()) - {-1} for i in (0, 1, 3, 5)]
    assert all(fewer < more for more, fewer in zip(sets, sets[1:], strict=False))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("g-search", "one of the two"),
        ("g-search:budget=0.5,eps=0.1", "one of the two"),
        ("g-search:budget=1.5", "a budget up to 1"),
        ("g-search:budget=0.2", "not met"),
        ("g-search:layers=2", "or say what it found"),
        ("g-search:layers=2+4,keep=50+60", "do not grow"),
    ],
)
def test_bad_settings(settings: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        searched(settings)
