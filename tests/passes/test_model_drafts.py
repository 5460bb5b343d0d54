"""Drafts made by models change no token, whatever the draft is worth; sampled rules keep the distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import elision
from elision.compiler import _draft
from elision.errors import BadInput
from elision.ir.drafting.policy import SIZES, Always, Policy
from elision.ir.program import drafting
from elision.ir.requests import Requests
from elision.ir.verify import Request
from elision.runtime.session import Session
from tests.passes.small import ROOM, ragged, tiny
from tests.runtime.conftest import words


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny(num_hidden_layers=4)


@pytest.fixture(scope="module", params=["cpu", pytest.param("reference", marks=pytest.mark.nightly)])
def plain(request: Any, original: Any) -> elision.Model:
    return elision.compile(original, target=request.param)


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return ragged()


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


@pytest.mark.parametrize("method", ["layer-skip-draft:exit=4,length=5", "spec-sampling:model=MODEL,length=5"])
def test_a_draft_like_the_target_is_accepted(plain: elision.Model, original: Any, tmp_path: Any, method: str) -> None:
    target = "reference" if plain.native is None else "cpu"
    plain.save(tmp_path / "same.elision")
    model = eager(elision.compile(original, [method.replace("MODEL", str(tmp_path / "same.elision"))], target=target))
    prompt = torch.arange(10)[None] % 5 + 1
    for options in ({}, {"do_sample": True, "seed": 3}):
        model.generate(prompt, max_new_tokens=61, **options)
        assert model.stats.rounds <= 11  # 6 tokens each, but for the first round, which measures what a level takes
        assert model.stats.accepted == model.stats.drafted


def test_caches_are_those_of_a_prefill(plain: elision.Model, drafted: elision.Model, batch: Any) -> None:
    """After rounds, what every cache holds is what the committed tokens alone give; the draft's own hold a part of it."""
    ids, mask = batch
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    session = Session(drafted._interpreter, 4, ROOM, drafted.drafting.run(4))
    logits = session.prefill(prompts)
    said = [[*p, int(line.argmax())] for p, line in zip(prompts, logits, strict=True)]
    for _ in range(6):
        requests = Requests([Request()] * 4, [torch.tensor(s) for s in said], [len(p) for p in prompts])
        for s, new in zip(said, session.round({r: s[-1] for r, s in enumerate(said)}, requests), strict=True):
            s += new
    assert session.drafts.drafted > 0 and any(len(s) > len(p) + 7 for s, p in zip(said, prompts, strict=True))
    fresh = Session(drafted._interpreter, 4, ROOM)
    fresh.prefill([s[:-1] for s in said])
    states = [name for name in drafted.program.states if not name.startswith("draft_")]
    assert len(states) == 4
    for name in states:
        one, two = session._stores[name], fresh._stores[name]
        assert torch.equal(one.totals(), two.totals()) and not one.index["node_live"].any()
        for what in "kv":
            for r, s in enumerate(said):
                got, wanted = (store.entries(what, len(s) - 1)[r] for store in (one, two))
                torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    for name in set(drafted.program.states) - set(states):
        store = session._stores[name]
        assert not store.index["node_live"].any()
        for r, s in enumerate(said):
            assert store.positions()[r, 0, : int(store.totals()[r])].tolist() == list(range(int(store.totals()[r])))
            assert len(s) - 6 <= int(store.totals()[r]) < len(s)


def test_what_does_not_pay_is_not_drafted(plain: elision.Model, drafted: elision.Model) -> None:
    """A call over n nodes costs n: speculation cannot win, and after a few tries there is none."""
    model, most = drafted, drafted.drafting.policy
    drafted.drafting.policy = Policy(lambda: np.array(SIZES, float))
    prompt = torch.arange(10)[None] % 5 + 1
    assert torch.equal(model.generate(prompt, max_new_tokens=140), plain.generate(prompt, max_new_tokens=140))
    assert sum(n for size, n in model.stats.sizes.items() if size > 1) <= 8
    drafted.drafting.policy = most


def test_native_and_reference_rounds_do_the_same(original: Any, batch: Any) -> None:
    rounds = []
    for target in ("cpu", "reference"):
        model = eager(elision.compile(original, ["layer-skip-draft:layers=2"], target=target))
        model.generate(*batch, max_new_tokens=40)
        rounds.append((model.stats.rounds, model.stats.drafted, model.stats.accepted))
    assert rounds[0] == rounds[1]


def test_artefacts_hold_both_models(original: Any, smaller: str, tmp_path: Any) -> None:
    model = eager(elision.compile(original, [f"spec-sampling:model={smaller},length=3"]))
    model.save(tmp_path / "both.elision")
    again = eager(elision.load(tmp_path / "both.elision"))
    prompt = torch.arange(10)[None] % 5 + 1
    assert torch.equal(again.generate(prompt, max_new_tokens=30), model.generate(prompt, max_new_tokens=30))
    assert again.stats.accepted == model.stats.accepted > 0
    assert drafting(again.program.round)[1] == ("spec-sampling:length=3,stop=0.0,rule=match",)


WRONG = {
    "layer-skip-draft": "say where drafts come from, by one of layers= or exit=",
    "spectr:exit=2,layers=1": "by one of layers= or exit= or model=",
    "layer-skip-draft:exit=5": "exit=5; expected 1 to 4",
    "layer-skip-draft:layers=7": "there is no layer 7",
    "layer-skip-draft:exit=2,rule=k-sec": "rule='k-sec'; these drafts are verified by match, chain",
    "spectr:exit=2,rule=chain": "rule chain verifies one chain, and there are 3",
    "spectr:exit=2,chains=9,length=9": "9 chains of 9 tokens",
    "dyspec:exit=2,nodes=64": "nodes=64; expected 1 to 63",
    "dyspec:exit=2,rule=k-seq": "verified by match, recursive",
    "layer-skip-draft:exit=2,length=64": "length=64",
    "del": "exits= is empty",
    "spec-sampling:model=nowhere.elision": "nowhere.elision",
}


@pytest.mark.parametrize("method", WRONG)
def test_bad_parameters(original: Any, method: str) -> None:
    with pytest.raises(BadInput, match=WRONG[method]):
        elision.compile(original, [method], target="reference")


def test_a_model_drafts_alone(original: Any) -> None:
    for passes in (["prompt-lookup", "layer-skip-draft:exit=2"], ["layer-skip-draft:exit=2", "prompt-lookup"]):
        with pytest.raises(BadInput, match="a model drafts alone"):
            elision.compile(original, passes, target="reference")


def test_a_draft_of_another_vocabulary_is_refused(original: Any, tmp_path: Any, smaller: str) -> None:
    path = str(tmp_path / "other.elision")
    elision.compile(tiny(num_hidden_layers=4, vocab_size=72), target="reference").save(path)
    with pytest.raises(BadInput, match="a vocabulary of 72, .* of 64: they must be equal"):
        elision.compile(original, [f"spec-sampling:model={path}"], target="reference")
    model = elision.load(smaller)
    model.tokenizer = words(64)
    model.save(path)
    with pytest.raises(BadInput, match="its tokenizer is another one"):
        _draft(words(63), path)
    assert _draft(words(64), path)[0].meta["vocab"] == 64


def test_a_draft_of_fewer_positions_is_left_behind(plain: elision.Model, original: Any, tmp_path: Any) -> None:
    """Beyond the positions of the draft there are no drafts, and the text goes on."""
    target, path = "reference" if plain.native is None else "cpu", str(tmp_path / "short.elision")
    short = tiny(num_hidden_layers=4, max_position_embeddings=40)
    short.load_state_dict(original.state_dict())
    elision.compile(short, target="reference").save(path)
    model = eager(elision.compile(original, [f"spec-sampling:model={path}"], target=target))
    prompt = torch.arange(10)[None] % 5 + 1
    assert torch.equal(model.generate(prompt, max_new_tokens=80), plain.generate(prompt, max_new_tokens=80))
    assert 0 < model.stats.accepted <= 30


@pytest.mark.parametrize("passes", [["layer-skip-draft:exit=2"], ["spectr:exit=2,chains=2,length=2"]])
def test_measured_without_drafts_and_by_every_rule(original: Any, passes: list[str], batch: Any) -> None:
    """What `elision bench` does; the reference measures what rules that need q cost, too."""
    from elision.runtime.measure import without_speculation

    model = elision.compile(original, passes, target="reference")
    with without_speculation(model):
        model.generate(batch[0][1:2], max_new_tokens=8)
    assert model.stats is not None and model.stats.drafted == 0
