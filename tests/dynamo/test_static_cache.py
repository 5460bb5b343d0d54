"""Steps of generate(cache_implementation="static") run natively, on the caller's cache tensors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from elision.backend import elision as backend
from elision.backend import report
from elision.errors import BadInput

SETTINGS: dict[str, Any] = {"max_new_tokens": 10, "cache_implementation": "static", "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    found = transformers.LlamaForCausalLM(config).eval()
    for p in found.parameters():
        p.data *= 3  # far from uniform, so that what a token sees decides what comes next
    return found


def prompts(rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Padded on the left."""
    ids = torch.randint(3, 99, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def steps() -> Any:
    """The report of the graph of a step."""
    (found,) = (g for g in report()["graphs"] if "mirrored" in " ".join(g.notes))
    return found


@pytest.mark.parametrize("options", [{}, {"target": "reference"}])
def test_tokens_are_those_of_eager(model: Any, options: dict[str, Any]) -> None:
    want = [model.generate(**prompts(seed=seed), **SETTINGS) for seed in range(3)]
    assert len({tuple(x[0, 9:].tolist()) for x in want}) == 3
    model.forward = torch.compile(model.forward, backend=backend, options=options)
    for seed in (0, 1, 2, 0):
        assert torch.equal(model.generate(**prompts(seed=seed), **SETTINGS), want[seed])
    first, second = report()["graphs"]  # the prompt's, which makes the cache, and the step's
    assert first.runs == "eager" and "past_key_values" in first.reason
    assert second.runs == ("interpreter" if options else "native") and not second.fallen and second.calls == 4 * 9


def test_the_callers_cache_is_written_and_what_others_write_is_read(model: Any) -> None:
    """Two caches in turns, one of which is written to between the steps, the other begun anew."""
    compiled = torch.compile(model, backend=backend)
    ours, theirs = [begun(model, 0), begun(model, 1)], [begun(model, 0), begun(model, 1)]
    for turn, (which, token) in enumerate([(0, 5), (0, 6), (1, 7), (0, 8), (0, 9), (1, 4), (1, 3), (1, 8), (1, 2)]):
        if turn == 4:
            for cache in (ours[0], theirs[0]):
                cache.layers[1].keys[:, :, 2] *= -1
        if turn == 7:
            for cache in (ours[1], theirs[1]):
                cache.reset()
                with torch.no_grad():
                    model(prompts(1, 5)["input_ids"][:, :4], past_key_values=cache)
        want, found = step(model, theirs[which], token), step(compiled, ours[which], token)
        assert torch.allclose(found, want, rtol=1e-4, atol=1e-4)
        for a, b in zip(ours[which].layers, theirs[which].layers, strict=True):
            assert torch.allclose(a.keys, b.keys, atol=1e-4) and torch.allclose(a.values, b.values, atol=1e-4)
            assert int(a.cumulative_length) == int(b.cumulative_length)
    assert steps().runs == "native" and not steps().fallen


def begun(model: Any, seed: int) -> Any:
    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    with torch.no_grad():
        model(prompts(1, seed)["input_ids"], past_key_values=cache)
    return cache


def step(run: Any, cache: Any, token: int) -> torch.Tensor:
    at = int(cache.layers[0].cumulative_length)
    mask = (torch.arange(24) <= at)[None, None, None]
    with torch.no_grad():
        given = {"position_ids": torch.tensor([[at]]), "attention_mask": mask, "past_key_values": cache}
        return run(torch.tensor([[token]]), **given).logits


def test_weight_formats_apply_and_passes_of_caches_are_refused(model: Any) -> None:
    rounded = copy.deepcopy(model)
    for p in rounded.parameters():
        p.data = p.bfloat16().float() if p.dim() == 2 else p.data
    compiled = torch.compile(model, backend=backend, options={"passes": ["bf16"]})
    step(compiled, begun(model, 1), 5)  # the first call of a graph gives its own results
    caches = [begun(model, 0) for _ in range(3)]
    for token in (5, 6, 7):
        found, want, otherwise = (step(m, c, token) for m, c in zip((compiled, rounded, model), caches, strict=True))
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-4) and not torch.allclose(found, otherwise, rtol=1e-3, atol=1e-3)
    assert steps().runs == "native" and not steps().fallen
    plain = model.forward
    for text in ("h2o:budget=100", "skip-layers:layers=1"):
        torch._dynamo.reset()
        model.forward = torch.compile(plain, backend=backend, options={"passes": [text]})
        with pytest.raises(BadInput, match=rf"{text}.*only weight formats apply; use elision\.compile"):
            model.generate(**prompts(), **SETTINGS)


def test_what_cannot_be_mirrored_runs_as_captured(model: Any) -> None:
    """A mask that hides a token of the prompt in the middle is not padding: positions say so."""
    compiled = torch.compile(model, backend=backend)
    cache = transformers.StaticCache(config=model.config, max_cache_len=24)
    mask = (torch.arange(24) <= 9)[None, None, None].clone()
    mask[..., 4] = False
    with torch.no_grad():
        model(prompts(1)["input_ids"], past_key_values=cache)
        given = {"position_ids": torch.tensor([[9]]), "attention_mask": mask, "past_key_values": cache}
        compiled(torch.tensor([[5]]), **given)
    assert report()["graphs"][0].runs == "eager" and "positions of new tokens" in report()["graphs"][0].reason


@pytest.mark.nightly
def test_inductor_runs_what_is_not_raised(model: Any) -> None:
    want = model.generate(**prompts(), **SETTINGS)
    model.forward = torch.compile(model.forward, backend=backend, options={"fallback": "inductor"})
    assert torch.equal(model.generate(**prompts(), **SETTINGS), want)
    assert [g.runs for g in report()["graphs"]] == ["inductor", "native"]
