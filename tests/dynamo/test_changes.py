"""Weights and settings that change after a graph was compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from compiled import close, decoder, graphs, ids, twice

from elision.backend import elision as backend


def test_weights_that_change_are_seen() -> None:
    model, given = decoder(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    before = twice(compiled, given, use_cache=False).logits
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
        after, want = compiled(given, use_cache=False).logits, model(given).logits
    assert close(after, want) and not close(after, before)
    assert "weights have changed" in next(iter(graphs()[0].fallen))
    torch._dynamo.reset()
    assert close(twice(compiled, given, use_cache=False).logits, want)
    assert [g.runs for g in graphs()] == ["native"]


@pytest.mark.parametrize("how", ["add", "copy"])
def test_weights_that_are_written_behind_torchs_back_are_seen(how: str) -> None:
    model, given = decoder(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    before = twice(compiled, given, use_cache=False).logits
    weight = model.model.layers[1].self_attn.o_proj.weight
    version = weight._version
    if how == "add":
        weight.data += 1
    else:
        weight.data.copy_(weight.data * 3)
    assert weight._version == version
    with torch.no_grad():
        after, want = compiled(given, use_cache=False).logits, model(given).logits
        assert close(after, want) and not close(after, before)
        twice(compiled, ids(3, 7), use_cache=False)  # another graph does not get the program of the weights before
    assert "weights have changed" in next(iter(graphs()[0].fallen)) and graphs()[1].runs == "native"


def test_weights_of_inference_mode_are_not_compiled() -> None:
    with torch.inference_mode():
        model, given = decoder(), ids(2, 9)
        compiled = torch.compile(model, backend=backend)
        for _ in range(2):
            assert close(compiled(given, use_cache=False).logits, model(given).logits)
            model.lm_head.weight.mul_(3)
    assert "inference_mode" in graphs()[0].reason


def test_settings_that_change_are_seen() -> None:
    config: Any = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(**config, num_key_value_heads=1, sliding_window=None)
    ).eval()
    for p in model.parameters():
        p.data *= 3
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for window, lengths in ((None, (9, 10)), (4, (3, 4, 12))):
            model.config.sliding_window = window
            for length in lengths:  # those within the window are the same with and without it
                found = compiled(ids(2, length), use_cache=False).logits
            assert close(found, model(ids(2, length), use_cache=False).logits)
    assert {g.runs for g in graphs()} == {"native"}


def test_floats_of_modules_that_change_are_told() -> None:
    """Dynamo passes them as tensors, once they have changed."""
    model, given = decoder(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    twice(compiled, given, use_cache=False)
    for epsilon in (10.0, 20.0):
        model.model.norm.variance_epsilon = epsilon
        with torch.no_grad():
            want = model(given, use_cache=False).logits
        assert close(twice(compiled, given, use_cache=False).logits, want)
    assert [g.runs for g in graphs()] == ["native", "eager"] and "variance_epsilon, a number that varies" in graphs()[1].reason
