"""Drafts made by models change no token, whatever the draft is worth; sampled rules keep the distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import elision
from elision.ir.drafting.policy import Always

ROOM = 160


def tiny(**changes: Any) -> Any:
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=ROOM, initializer_range=0.1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny()


@pytest.fixture(scope="module", params=["cpu", "reference"])
def plain(request: Any, original: Any) -> elision.Model:
    return elision.compile(original, target=request.param)


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Four prompts of different lengths that repeat themselves, left-padded: ids and mask."""
    lengths, generator = (7, 30, 1, 18), torch.Generator().manual_seed(1)
    ids, mask = torch.zeros(4, 30, dtype=torch.int64), torch.zeros(4, 30, dtype=torch.int64)
    for row, n in enumerate(lengths):
        ids[row, 30 - n :] = torch.randint(1, 9, (n,), generator=generator)
        mask[row, 30 - n :] = 1
    return ids, mask


def eager(model: elision.Model) -> elision.Model:
    """A model that always drafts as deep as it may."""
    assert model.drafting is not None
    model.drafting.policy = Always(64)
    return model


METHODS = [
    "layer-skip-draft:layers=2",
    "layer-skip-draft:exit=3,length=5,stop=0.05",
    "spec-sampling:model=MODEL",
    "spectr:exit=3,chains=2,rule=match",
    "dyspec:exit=3,nodes=12",
    "dyspec:model=MODEL,nodes=12",
    "del:exits=2+3",
]


@pytest.fixture(scope="module")
def smaller(original: Any, tmp_path_factory: Any) -> str:
    """The model without a layer and in int8, as an artefact."""
    path = str(tmp_path_factory.mktemp("draft") / "draft.elision")
    elision.compile(original, ["skip-layers:layers=1", "int8"], target="reference").save(path)
    return path


@pytest.fixture(scope="module", params=METHODS)
def drafted(request: Any, plain: elision.Model, original: Any, smaller: str) -> elision.Model:
    target = "reference" if plain.native is None else "cpu"
    return eager(elision.compile(original, [request.param.replace("MODEL", smaller)], target=target))


def test_greedy_tokens_are_those_of_plain_decoding(plain: elision.Model, drafted: elision.Model, batch: Any) -> None:
    ids, mask = batch
    for row in range(4):
        prompt = ids[row : row + 1, ids.shape[1] - int(mask[row].sum()) :]
        assert torch.equal(drafted.generate(prompt, max_new_tokens=60), plain.generate(prompt, max_new_tokens=60))
        assert drafted.stats.drafted > 0
    assert drafted.stats.accepted > 0 and drafted.stats.rounds < 59
    together = drafted.generate(ids, mask, max_new_tokens=60)
    assert torch.equal(together, plain.generate(ids, mask, max_new_tokens=60))
    assert drafted.stats.accepted > 0


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_sampled_tokens_are_those_of_plain_sampling(
    plain: elision.Model, drafted: elision.Model, batch: Any, options: dict[str, float]
) -> None:
    """With rule match, which is the default of all but SpecTr."""
    ids, mask = batch
    found = drafted.generate(ids, mask, max_new_tokens=40, do_sample=True, seed=[4, 5, 6, 7], **options)
    assert torch.equal(found, plain.generate(ids, mask, max_new_tokens=40, do_sample=True, seed=[4, 5, 6, 7], **options))
    assert drafted.stats.accepted > 0


def test_drafts_end_at_the_last_position(plain: elision.Model, drafted: elision.Model) -> None:
    prompt = torch.arange(10)[None] % 5 + 1
    for new in (1, 2, 3, ROOM - 10):
        found = drafted.generate(prompt, max_new_tokens=new)
        assert found.shape[1] == 10 + new and torch.equal(found, plain.generate(prompt, max_new_tokens=new))
