"""Speculation on the real model gives the tokens of plain decoding, greedy, in float32: fifty prompts of 128 tokens with each
drafter, each pair and all; ragged batches on some of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import elision
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.runtime.speculation import drafting_of

Pair = tuple[elision.Model, elision.Model]
METHODS = ["prompt-lookup", "pain-trie", "token-recycling", "aded"]
FILES = Path(__file__).parents[2] / "benchmarks" / "prompts"
TOKENS = 128


def messages() -> list[str]:
    """What users ask: the benchmark's messages, and questions about Python."""
    found = [m.strip() for file in sorted(FILES.glob("*.txt")) for m in file.read_text().split("\n=====\n")]
    return [*found, *(f"Explain this:\n{topics[name][:400]}" for name in sorted(topics)[: 50 - len(found)])]


@pytest.fixture(scope="module")
def models() -> Iterator[Pair]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield elision.compile("smollm2", threads=1), elision.compile("smollm2", METHODS, threads=1)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts(models: Pair) -> list[torch.Tensor]:
    tokenizer = models[0].tokenizer
    assert tokenizer is not None
    return [torch.tensor([tokenizer.encode(tokenizer.chat(m), add_special=False)]) for m in messages()]


@pytest.fixture(scope="module")
def expected(models: Pair, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [models[0].generate(ids, max_new_tokens=TOKENS, temperature=0) for ids in prompts]


def using(model: elision.Model, names: tuple[int, ...]) -> elision.Model:
    """The model with some of its drafters, cold."""
    fresh, known = drafting_of(model._interpreter, ""), model.drafting
    assert fresh is not None and known is not None
    model.drafting = Drafting([fresh.drafters[i] for i in names], known.policy)
    return model


CHOICES = [(i,) for i in range(4)] + list(combinations(range(4), 2)) + [(0, 1, 2, 3)]


@pytest.mark.nightly
@pytest.mark.parametrize("names", CHOICES)
def test_one_by_one(
    models: Pair, prompts: list[torch.Tensor], expected: list[torch.Tensor], names: tuple[int, ...]
) -> None:
    assert len(prompts) == 50
    model, accepted = using(models[1], names), 0
    for ids, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(ids, max_new_tokens=TOKENS, temperature=0), tokens)
        assert model.stats is not None
        accepted += model.stats.accepted
    assert accepted > 100


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("draft") / "int4.elision"
    elision.compile("smollm2", ["int4"]).save(path)
    return path


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("text", "always"),
    [
        ("spec-sampling:model={},length=4", False),
        ("dyspec:model={},nodes=12", False),
        ("spectr:model={},chains=2,length=3", False),
        ("layer-skip-draft:exit=20,length=3", True),
        ("del:exits=10+20", True),
    ],
)
def test_drafts_of_models(
    prompts: list[torch.Tensor], expected: list[torch.Tensor], draft: Path, text: str, always: bool
) -> None:
    """``always``: also where drafts do not pay, as those of layers that were not trained to draft."""
    model, drafted = elision.compile("smollm2", [text.format(draft)], threads=1), 0
    if always:
        assert model.drafting is not None
        model.drafting.policy = Always(12)
    for ids, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(ids, max_new_tokens=TOKENS, temperature=0), tokens)
        assert model.stats is not None
        drafted += model.stats.drafted
    assert drafted > 100


@pytest.mark.nightly
@pytest.mark.parametrize("names", [(1,), (2,), (0, 1, 2, 3)])
def test_ragged_batches_of_four(models: Pair, prompts: list[torch.Tensor], names: tuple[int, ...]) -> None:
    model, short = using(models[1], names), sorted(prompts, key=lambda ids: ids.shape[1])[:12]
    for batch in (short[i::3] for i in range(3)):
        longest = max(ids.shape[1] for ids in batch)
        ids = torch.cat([torch.nn.functional.pad(x, (longest - x.shape[1], 0)) for x in batch])
        mask = torch.cat([torch.nn.functional.pad(torch.ones_like(x), (longest - x.shape[1], 0)) for x in batch])
        plain = models[0].generate(ids, mask, max_new_tokens=64, temperature=0)
        assert torch.equal(model.generate(ids, mask, max_new_tokens=64, temperature=0), plain)
