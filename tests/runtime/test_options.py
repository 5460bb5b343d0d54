"""Arguments of `generate` that cannot be used: every message says what was given and what is possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elision.errors import BadInput
from tests.runtime.conftest import Pair, pair

IDS = torch.tensor([[5, 6, 7], [0, 8, 9]])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), r"LongTensor \[B, T\].*got torch.int64 \[2, 0\]"),
        (torch.tensor([5, 6]), r"LongTensor \[B, T\].*got torch.int64 \[2\]"),
        (torch.tensor([[5.0]]), "LongTensor.*got torch.float32"),
        (torch.tensor([[5]], dtype=torch.int32), "LongTensor.*got torch.int32"),
        (torch.tensor([[5, 128]]), "token id 128; the vocabulary has 0 to 127"),
        (torch.tensor([[5, -1]]), "token id -1; the vocabulary has 0 to 127"),
        (torch.full((1, 64), 5), "65 positions are needed, but the model has 64"),
        (torch.full((9, 2), 5), "9 sequences.*max_batch=8"),
        ("", "prompt 0 is empty"),
        (["t005", ""], "prompt 1 is empty"),
        ([], r"LongTensor \[B, T\], a text or a list of texts, got \[\]"),
        ([[5, 6]], r"a text or a list of texts, got \[\[5, 6\]\]"),
        (None, "a text or a list of texts, got None"),
        (7, "a text or a list of texts, got 7"),
    ],
)
def test_inputs(llama: Pair, inputs: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        llama.compiled.generate(inputs, max_new_tokens=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask \[2, 4\].*\[2, 3\]"),
        ({"attention_mask": [[1, 1, 1]]}, r"attention_mask list.*\[2, 3\]"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "prompt 1 is empty"),
        ({"temperature": -0.5}, "temperature=-0.5; expected more than 0, or 0 for greedy"),
        ({"temperature": -0.5, "do_sample": False}, "temperature=-0.5; expected more than 0"),
        ({"temperature": float("nan")}, "temperature=nan; expected more than 0"),
        ({"temperature": "warm"}, "temperature='warm'; expected more than 0"),
        ({"temperature": 0, "do_sample": True}, "temperature=0 is greedy, but do_sample=True"),
        ({"top_p": 1.5}, "top_p=1.5; expected more than 0 and at most 1"),
        ({"top_p": 0, "temperature": 1.0}, "top_p=0; expected more than 0"),
        ({"top_k": -3}, "top_k=-3; expected an integer of at least 0"),
        ({"min_p": 2}, "min_p=2; expected from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0; expected more than 0"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1; expected an integer from 0 to max_new_tokens=2"),
        ({"min_new_tokens": 3}, "min_new_tokens=3; expected an integer from 0 to max_new_tokens=2"),
        ({"min_new_tokens": 1.5}, "min_new_tokens=1.5; expected an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; expected an integer of at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0; expected an integer"),
        ({"num_return_sequences": 0}, "num_return_sequences=0; expected an integer of at least 1"),
        ({"num_return_sequences": 1.0}, "num_return_sequences=1.0; expected an integer"),
        ({"num_return_sequences": 5}, "10 sequences.*max_batch=8"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'; expected a token id"),
        ({"eos_token_id": [2, 2.5]}, r"eos_token_id=\[2, 2.5\]; expected a token id"),
        ({"stop": ""}, "stop strings must be text that is not empty"),
        ({"stop": ["a", 5]}, "stop strings must be text"),
        ({"stop": 5}, "stop strings must be text"),
        ({"streamer": 5}, "streamer: expected an object with put and end, or a function, got int"),
        ({"streamer": type("S", (), {"put": 0, "end": 0})()}, "takes one sequence, got 2"),
    ],
)
def test_arguments(llama: Pair, given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        llama.compiled.generate(IDS, **{"max_new_tokens": 2, **given})


def test_unknown_arguments_are_named(llama: Pair) -> None:
    with pytest.raises(BadInput, match="does not support num_beams=4"):
        llama.compiled.generate(IDS, num_beams=4)  # type: ignore[call-arg]


def test_texts_take_no_attention_mask(llama: Pair) -> None:
    with pytest.raises(BadInput, match="attention_mask goes with token ids"):
        llama.compiled.generate("t005", torch.ones(1, 1))


def test_without_a_tokenizer_texts_and_stop_strings_are_refused(llama: Pair) -> None:
    tokenizer, llama.compiled.tokenizer = llama.compiled.tokenizer, None
    try:
        with pytest.raises(BadInput, match="text needs a tokenizer.*pass token ids"):
            llama.compiled.generate("t005")
        with pytest.raises(BadInput, match="stop strings need a tokenizer"):
            llama.compiled.generate(IDS, stop="t")
        assert llama.compiled.generate(IDS, max_new_tokens=2).shape == (2, 5)
    finally:
        llama.compiled.tokenizer = tokenizer


def test_a_call_that_was_refused_leaves_the_statistics_of_the_last(llama: Pair) -> None:
    llama.compiled.generate(IDS, max_new_tokens=2)
    before = llama.compiled.stats
    with pytest.raises(BadInput):
        llama.compiled.generate(IDS, max_new_tokens=0)
    assert llama.compiled.stats is before


def test_transformers_defaults_of_an_empty_generation_config_hold() -> None:
    assert pair(16).compiled.defaults == {"top_k": 50, "eos_token_id": 2, "pad_token_id": 0}
