"""Speculation changes no token: greedy and sampled, one row and ragged rows, native and reference, each drafter and pairs."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

import elision
from elision.errors import BadInput
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.ir.program import drafting
from elision.passes import from_text
from tests.passes.small import ROOM, ragged, tiny

METHODS = ["prompt-lookup", "pain-trie:nodes=20", "token-recycling:nodes=20", "aded:width=4"]


@pytest.fixture(scope="module", params=["cpu", pytest.param("reference", marks=pytest.mark.nightly)])
def models(request: Any) -> tuple[elision.Model, elision.Model]:
    """The model alone, and with all drafters."""
    original = tiny()
    return elision.compile(original, target=request.param), elision.compile(original, METHODS, target=request.param)


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return ragged()


def using(model: elision.Model, names: tuple[int, ...], nodes: int = 12) -> elision.Model:
    """The model with some of its drafters, which always draft, cold."""
    from elision.runtime.speculation import drafting_of

    fresh = drafting_of(model._interpreter, "")
    assert fresh is not None
    model.drafting = Drafting([fresh.drafters[i] for i in names], Always(nodes))
    return model


CHOICES = [(i,) for i in range(len(METHODS))] + list(combinations(range(len(METHODS)), 2)) + [tuple(range(len(METHODS)))]


#: The interpreter is slow, and its rounds are the same for two drafters as for four.
CASES = [("cpu", names) for names in CHOICES] + [("reference", names) for names in (CHOICES[2], CHOICES[-1])]


@pytest.mark.parametrize(("models", "names"), CASES, indirect=["models"])
def test_greedy_tokens_are_those_of_plain_decoding(models: Any, batch: Any, names: tuple[int, ...]) -> None:
    plain, drafted = models
    using(drafted, names)
    ids, mask = batch
    for row in range(4):
        prompt = ids[row : row + 1, ids.shape[1] - int(mask[row].sum()) :]
        assert torch.equal(drafted.generate(prompt, max_new_tokens=60), plain.generate(prompt, max_new_tokens=60))
    assert drafted.stats.accepted > 0 and drafted.stats.rounds < 59
    together = drafted.generate(ids, mask, max_new_tokens=60)
    assert torch.equal(together, plain.generate(ids, mask, max_new_tokens=60))
    assert drafted.stats.accepted > 0


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_sampled_tokens_are_those_of_plain_sampling(models: Any, batch: Any, options: dict[str, float]) -> None:
    plain, drafted = models
    using(drafted, (0, 1, 2, 3))
    ids, mask = batch
    found = drafted.generate(ids, mask, max_new_tokens=50, do_sample=True, seed=[4, 5, 6, 7], **options)
    assert torch.equal(found, plain.generate(ids, mask, max_new_tokens=50, do_sample=True, seed=[4, 5, 6, 7], **options))
    assert drafted.stats.drafted > 0


def test_greedy_with_penalties_and_ends(models: Any, batch: Any) -> None:
    plain, drafted = models
    using(drafted, (1, 2))
    ids, mask = batch
    free = plain.generate(ids, mask, max_new_tokens=30)
    eos = [int(free[0, 35]), int(free[1, 50])]
    for options in ({"eos_token_id": eos}, {"repetition_penalty": 1.3}, {"eos_token_id": eos, "min_new_tokens": 12}):
        expected = plain.generate(ids, mask, max_new_tokens=30, **options)
        assert torch.equal(drafted.generate(ids, mask, max_new_tokens=30, **options), expected)


def test_drafts_end_at_the_last_position(models: Any) -> None:
    """A tree is cut where the positions of the model, or of the run, end; no token is lost."""
    plain, drafted = models
    using(drafted, (1, 2), nodes=40)
    prompt = torch.arange(10)[None] % 5 + 1
    for new in (1, 2, 3, ROOM - 10):
        found = drafted.generate(prompt, max_new_tokens=new)
        assert found.shape[1] == 10 + new and torch.equal(found, plain.generate(prompt, max_new_tokens=new))


def test_memory_of_the_drafters_outlives_a_run(models: Any, batch: Any) -> None:
    _, drafted = models
    using(drafted, (1,))
    prompt = batch[0][1:2]
    rounds = []
    for _ in range(2):
        drafted.generate(prompt, max_new_tokens=60)
        rounds.append(drafted.stats.rounds)
    assert rounds[1] < rounds[0]  # the same answer again is in the trie


def test_the_policy_switches_off_what_does_not_pay(models: Any, batch: Any) -> None:
    from elision.ir.drafting.policy import SIZES, Policy

    plain, drafted = models
    using(drafted, (2, 3))
    import numpy as np

    drafted.drafting.policy = Policy(lambda: np.array(SIZES, float))  # a call over n nodes costs n: never worth it
    prompt = batch[0][1:2]
    assert torch.equal(drafted.generate(prompt, max_new_tokens=60), plain.generate(prompt, max_new_tokens=60))
    assert drafted.stats.drafted == 0 and drafted.stats.rounds == 59


def test_statistics_add_up(models: Any, batch: Any) -> None:
    _, drafted = models
    using(drafted, (0, 2))
    ids, mask = batch
    drafted.generate(ids, mask, max_new_tokens=40)
    stats = drafted.stats
    assert set(stats.drafters) == {"prompt-lookup", "token-recycling"}
    assert stats.new_tokens == 4 * 40 and stats.accepted <= stats.drafted
    each = sum(c.accepted for c in stats.drafters.values())
    assert each >= stats.accepted > 0  # a node that two propose counts for both
    assert 0 < stats.draft_time < stats.decode_time and stats.tokens_per_round > 1


def test_native_and_reference_rounds_do_the_same(batch: Any) -> None:
    original, rounds = tiny(), []
    for target in ("cpu", "reference"):
        model = using(elision.compile(original, METHODS, target=target), (0, 1, 2, 3))
        model.generate(*batch, max_new_tokens=40)
        rounds.append((model.stats.rounds, model.stats.drafted, model.stats.accepted))
    assert rounds[0] == rounds[1]


def test_passes_on_the_round(models: Any) -> None:
    _, drafted = models
    depth, methods = drafting(drafted.program.round)
    assert depth == 64 and [m.partition(":")[0] for m in methods] == [m.partition(":")[0] for m in METHODS]
    assert drafted.program.quality == "exact" and "token-recycling:nodes=20" in drafted.program.applied


WRONG = [["prompt-lookup", "prompt-lookup:match=2"], ["token-recycling:nodes=64"], ["token-recycling:k=0"], ["aded:width=0"]]


@pytest.mark.parametrize("passes", WRONG)
def test_bad_parameters(passes: list[str]) -> None:
    with pytest.raises(BadInput, match="given twice|expected 1 to"):
        elision.compile(tiny(), passes, target="reference")


def test_skip_layers_after_the_round_keeps_the_drafters() -> None:
    model = elision.compile(tiny(), [METHODS[2], "skip-layers:layers=1"], target="reference")
    assert drafting(model.program.round)[1] and from_text("token-recycling").text() == "token-recycling"


def test_artefacts_keep_the_drafters(tmp_path: Any, batch: Any) -> None:
    model = elision.compile(tiny(), METHODS[1:3])
    model.save(tmp_path / "m.elision")
    again = elision.load(tmp_path / "m.elision")
    prompt = batch[0][1:2]
    using(again, (0, 1))
    assert torch.equal(again.generate(prompt, max_new_tokens=40), model.generate(prompt, max_new_tokens=40))
    assert again.stats.accepted > 0


def test_a_text_that_ends_inside_a_draft_counts_what_it_has(models: Any, batch: Any) -> None:
    """Tokens after the end were accepted by the round, but are none of the text."""
    plain, drafted = models
    using(drafted, (0, 1, 2, 3), nodes=40)
    prompt = batch[0][1:2]
    text = plain.generate(prompt, max_new_tokens=60)[0, 30:].tolist()
    for place in (20, 33, 41):
        drafted.generate(prompt, max_new_tokens=60, eos_token_id=[text[place]])
        stats = drafted.stats
        assert stats.new_tokens == text.index(text[place]) + 1 and stats.turns == stats.rounds
        assert stats.accepted <= stats.new_tokens - 1
        assert stats.tokens_per_round == pytest.approx((stats.new_tokens - 1) / max(stats.rounds, 1))


def test_a_model_with_few_positions_is_measured_within_them() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=24, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    original: Any = GPT2LMHeadModel(config).eval()
    model = elision.compile(original, ["prompt-lookup:match=1"], target="reference")
    ids = torch.tensor([[3, 4, 3, 4, 3]])
    assert model.generate(ids, max_new_tokens=19, eos_token_id=[]).shape == (1, 24)


def test_without_speculation_nothing_is_drafted(models: Any, batch: Any) -> None:
    from elision.runtime.measure import without_speculation

    _, drafted = models
    using(drafted, (1, 2))
    with without_speculation(drafted):
        drafted.generate(batch[0][1:2], max_new_tokens=30)
    assert drafted.stats.drafted == 0
    drafted.generate(batch[0][1:2], max_new_tokens=30)
    assert drafted.stats.drafted > 0
