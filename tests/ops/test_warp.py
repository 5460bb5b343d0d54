"""The warp equals transformers' logits processors, tie for tie, and refuses what is out of range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from elision.errors import BadInput
from elision.ir.warp import Warp, penalise, warp

VOCAB = 12


def by_transformers(
    logits: torch.Tensor, history: torch.Tensor, params: Warp
) -> tuple[torch.Tensor, torch.Tensor]:
    """Penalised scores and probabilities ``[V]``, by the processors in the order of transformers."""
    processors: list[Any] = []
    if params.repetition_penalty != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.suppress:
        processors.append(hf.SuppressTokensLogitsProcessor(params.suppress))
    penalised = hf.LogitsProcessorList(processors)(history[None], logits[None].float())
    processors = []
    if params.temperature != 1.0:
        processors.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    return penalised[0], hf.LogitsProcessorList(processors)(history[None], penalised)[0].softmax(-1)


warps = st.builds(
    Warp,
    temperature=st.just(1.0) | st.floats(0.05, 5.0),
    top_k=st.just(0) | st.integers(1, VOCAB + 3),
    top_p=st.just(1.0) | st.floats(1e-6, 0.9999),
    min_p=st.just(0.0) | st.floats(0.0, 1.0),
    repetition_penalty=st.just(1.0) | st.floats(0.2, 3.0),
    suppress=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
)
#: Halves of integers tie often; the others do not.
rows = st.lists(
    st.integers(-8, 8).map(lambda i: i / 2) | st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB
)
histories = st.lists(st.integers(0, VOCAB + 2), min_size=1, max_size=8)


@given(
    rows=st.lists(st.tuples(rows, histories), min_size=1, max_size=3),
    params=warps,
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_warp_and_penalise_equal_transformers(rows: list[Any], params: Warp, dtype: str) -> None:
    logits = torch.tensor([row for row, _ in rows]).to(getattr(torch, dtype))
    given_logits = logits.clone()
    past = [torch.tensor(history) for _, history in rows]
    penalised, p = penalise(logits, past, params), warp(logits, past, params)
    assert penalised.dtype == p.dtype == torch.float32
    for i, history in enumerate(past):
        expected_penalised, expected = by_transformers(logits[i], history, params)
        assert torch.equal(penalised[i], expected_penalised)
        assert torch.equal(p[i], expected)
    assert torch.equal(logits, given_logits)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (Warp(top_k=2), {1, 2, 3}),  # two tie for the second place: both stay
        (Warp(top_p=0.5), {1, 3}),  # of two that tie at the edge, the one with the higher id stays
        (Warp(min_p=1.0), {1}),
        (Warp(top_k=2, suppress=(1,)), {2, 3}),
        (Warp(suppress=(1, -1, 99)), {0, 2, 3, 4}),  # ids outside the vocabulary change nothing
        (Warp(top_p=1e-9), {1}),
    ],
)
def test_what_stays_possible(params: Warp, kept: set[int]) -> None:
    p = warp(torch.tensor([[0.0, 2.0, 1.5, 1.5, -1.0]]), [torch.tensor([0])], params)[0]
    assert set(p.nonzero().flatten().tolist()) == kept
    assert float(p.sum()) == pytest.approx(1.0)


def test_top_p_drops_a_tail_of_exactly_the_rest() -> None:
    params = Warp(top_p=0.5)
    logits, past = torch.zeros(1, 2), torch.tensor([0])
    assert warp(logits, [past], params).tolist() == [[0.0, 1.0]]
    assert by_transformers(logits[0], past, params)[1].tolist() == [0.0, 1.0]


def test_repetition_counts_a_token_once_and_only_for_its_own_history() -> None:
    logits = torch.tensor([[4.0, -4.0, 1.0]]).repeat(2, 1)
    found = penalise(logits, [torch.tensor([0, 1, 0, 0]), torch.tensor([2])], Warp(repetition_penalty=2.0))
    assert found.tolist() == [[2.0, -8.0, 1.0], [4.0, -4.0, 0.5]]


def test_suppression_ends_at_its_position() -> None:
    params = Warp(suppress=(1,), suppress_before=3)
    past = [torch.zeros(n, dtype=torch.int64) for n in (2, 3)]  # the next tokens are at positions 2 and 3
    assert penalise(torch.zeros(2, 2), past, params).tolist() == [[0.0, -math.inf], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", 0.0, "0 for greedy"),
        ("temperature", -1.0, "more than 0"),
        ("temperature", math.nan, "more than 0"),
        ("temperature", math.inf, "more than 0"),
        ("temperature", "hot", "more than 0"),
        ("top_k", -1, "at least 0"),
        ("top_k", 2.0, "integer"),
        ("top_k", True, "integer"),
        ("top_p", 0.0, "more than 0 and at most 1"),
        ("top_p", 1.01, "more than 0 and at most 1"),
        ("top_p", None, "more than 0 and at most 1"),
        ("min_p", -0.1, "from 0"),
        ("min_p", 1.1, "from 0"),
        ("repetition_penalty", 0.0, "more than 0"),
        ("suppress", ("eos",), "token ids"),
        ("suppress_before", -1, "position"),
    ],
)
def test_out_of_range_is_refused_by_name_value_and_range(name: str, value: Any, expected: str) -> None:
    with pytest.raises(BadInput) as caught:
        Warp(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r};") and expected in message
