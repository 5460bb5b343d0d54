"""Sampled rules end to end: the joint distribution of the first tokens is the target's, whatever drafted them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import elision
from elision.ir.drafting.model import _Round
from tests.passes.small import tiny
from tests.passes.test_model_drafts import eager

ROWS, CALLS, NEW = 512, 6, 3
PROMPT = torch.tensor([[1, 5, 2]])
TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny(num_hidden_layers=4, vocab_size=8, initializer_range=0.3)


@pytest.fixture(scope="module")
def expected(original: Any) -> np.ndarray:
    """The exact joint distribution of the tokens after the prompt, ``[8, 8, 8]``."""
    found = np.zeros((8,) * NEW)
    with torch.inference_mode():
        for tokens in product(range(8), repeat=NEW):
            ids = torch.cat((PROMPT, torch.tensor([tokens])), 1)
            p = (original(ids).logits[0].double() / TEMPERATURE).softmax(-1)
            found[tokens] = np.prod([float(p[PROMPT.shape[1] - 1 + i, t]) for i, t in enumerate(tokens)])
    return found


def likelihood(model: elision.Model, expected: np.ndarray) -> float:
    """The chance that tokens of the expected distribution differ from it as much as the model's do."""
    seen = np.zeros_like(expected)
    for seed in range(CALLS):
        out = model.generate(
            PROMPT, max_new_tokens=NEW, num_return_sequences=ROWS, do_sample=True, temperature=TEMPERATURE, seed=seed, top_k=0
        )
        np.add.at(seen, tuple(out[:, -NEW:].T.numpy()), 1)
    assert model.stats is not None and 0 < model.stats.accepted < model.stats.drafted
    wanted, got = expected.ravel() * seen.sum(), seen.ravel()
    large = wanted >= 5  # the rest is one cell
    cells = np.array([[*got[large], got[~large].sum()], [*wanted[large], wanted[~large].sum()]])
    return float(stats.chisquare(cells[0], cells[1] * cells[0].sum() / cells[1].sum()).pvalue)


RULES = [
    "layer-skip-draft:exit=1,length=2,rule=chain",
    "layer-skip-draft:layers=2,length=2,rule=block",
    "spectr:exit=1,chains=3,length=2",
    "spectr:exit=2,chains=2,length=2,rule=recursive",
    "dyspec:exit=1,nodes=8,length=2,rule=recursive",
]


def compiled(original: Any, method: str) -> elision.Model:
    return eager(elision.compile(original, [method], target="reference", max_batch=ROWS))


@pytest.mark.parametrize("method", RULES)
def test_the_joint_distribution_is_the_targets(original: Any, expected: np.ndarray, method: str) -> None:
    model = compiled(original, method)
    assert model.program.quality == "distribution"
    assert likelihood(model, expected) > 1e-4


def test_another_q_than_was_drawn_from_is_noticed(
    original: Any, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = _Round.drawn
    monkeypatch.setattr(_Round, "drawn", lambda *args: tuple(q.clamp_min(1e-3).sqrt() for q in true(*args)))
    assert likelihood(compiled(original, RULES[0]), expected) < 1e-4
