"""Sampled tokens: their distribution is the exact one of transformers' processors, and they hang on nothing but their key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers.generation import logits_process as hf

from elision.errors import BadInput
from tests.runtime.conftest import Pair

RUNS = 4000
PROMPT = [3, 5, 3]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.25},
    "penalty": {"repetition_penalty": 1.7},
    "all": {"temperature": 1.3, "top_k": 6, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
}


def exact(pair: Pair, options: dict[str, Any]) -> np.ndarray:
    """The joint distribution ``[8, 8]`` of the first two new tokens, by transformers' model and processors."""
    makers = {
        "repetition_penalty": hf.RepetitionPenaltyLogitsProcessor,
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    processors = hf.LogitsProcessorList([maker(options[name]) for name, maker in makers.items() if name in options])

    def following(ids: Any) -> torch.Tensor:
        with torch.no_grad():
            logits = pair.original(ids).logits[:, -1]
        return processors(ids, logits).softmax(-1).double()

    first = following(torch.tensor([PROMPT]))[0]
    second = following(torch.tensor([[*PROMPT, t] for t in range(8)]))
    return (first[:, None] * second).numpy()  # type: ignore[no-any-return]


def counted(pair: Pair, options: dict[str, Any], seed: int) -> np.ndarray:
    options = {"do_sample": True, "eos_token_id": [], "max_new_tokens": 2, "seed": seed, **options}
    found = pair.compiled.generate(torch.tensor([PROMPT]), num_return_sequences=RUNS, **options)[:, 3:].numpy()
    table = np.zeros((8, 8))
    np.add.at(table, (found[:, 0], found[:, 1]), 1)
    return table


def pvalue(table: np.ndarray, p: np.ndarray) -> float:
    """Chi-square with all cells of an expectation below 5 as one; 0 if something impossible was drawn."""
    if table[p == 0].sum():
        return 0.0
    big = p * RUNS >= 5
    seen = np.append(table[big], table[~big].sum())
    expected = np.append(p[big], p[~big].sum()) * RUNS
    used = expected > 0
    return float(stats.chisquare(seen[used], expected[used] * seen[used].sum() / expected[used].sum()).pvalue)


@pytest.fixture(scope="module")
def joints(small: Pair) -> dict[str, np.ndarray]:
    return {name: exact(small, options) for name, options in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_tokens_follow_the_exact_joint_distribution_and_no_other(
    small: Pair, joints: dict[str, np.ndarray], name: str
) -> None:
    table = counted(small, CASES[name], seed=len(name))
    assert table.sum() == RUNS and pvalue(table, joints[name]) > 1e-3
    for other, p in joints.items():
        if other != name:
            assert pvalue(table, p) < 1e-4, other


def test_equal_prompts_in_one_batch_draw_differently_and_a_seed_repeats(small: Pair) -> None:
    ids = torch.tensor([PROMPT] * 6)
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": [], "temperature": 1.0}
    found = small.compiled.generate(ids, seed=3, **options)
    assert len({tuple(row) for row in found.tolist()}) == 6
    assert torch.equal(found, small.compiled.generate(ids, seed=3, **options))
    assert not torch.equal(found, small.compiled.generate(ids, seed=4, **options))
    assert torch.equal(found, small.compiled.generate(ids, **options, seed=3 + (1 << 64)))


def test_a_row_does_not_depend_on_its_batch(
    llama: Pair, prompts: list[list[int]], padded: tuple[torch.Tensor, torch.Tensor]
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": [], "temperature": 1.2, "repetition_penalty": 1.3}
    seeds = [11, 7, 11, 2]
    together = llama.compiled.generate(*padded, seed=seeds, **options)
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        alone = llama.compiled.generate(torch.tensor([prompt]), seed=[seed], **options)
        assert alone[0, -12:].tolist() == row[-12:].tolist()
    order = [2, 0, 3, 1]
    shuffled = llama.compiled.generate(padded[0][order], padded[1][order], seed=[seeds[i] for i in order], **options)
    assert torch.equal(shuffled, together[order])


def test_rows_of_one_seed_are_counted_from_the_first(llama: Pair, padded: tuple[torch.Tensor, torch.Tensor]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": [], "temperature": 1.2, "seed": 9}
    both = llama.compiled.generate(padded[0][:2], padded[1][:2], **options)
    assert torch.equal(both, llama.compiled.generate(*padded, **options)[:2])


def test_copies_of_a_prompt_have_keys_of_their_own(llama: Pair, prompts: list[list[int]]) -> None:
    ids = torch.tensor([prompts[0], prompts[0]])
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_token_id": [], "temperature": 1.2, "num_return_sequences": 3}
    assert len({tuple(r) for r in llama.compiled.generate(ids, seed=5, **options).tolist()}) == 6
    listed = llama.compiled.generate(ids, seed=[5, 6], **options).tolist()
    assert len({tuple(r) for r in listed}) == 6
    assert listed[:3] == llama.compiled.generate(ids[:1], seed=[5], **options).tolist()


def test_seeds_that_do_not_fit_are_refused(llama: Pair, padded: tuple[torch.Tensor, torch.Tensor]) -> None:
    for seed in ([1, 2], "abc", 1.5, [1, 2, 3, "x"]):
        with pytest.raises(BadInput, match="seed.*integer"):
            llama.compiled.generate(*padded, max_new_tokens=2, seed=seed)  # type: ignore[arg-type]


def test_generation_leaves_the_random_state_of_torch_alone(small: Pair) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    small.compiled.generate(torch.tensor([PROMPT]), max_new_tokens=5, temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())
