"""`Model.generate` on a GPU, by the driver that runs kernels under Triton's interpreter: the tokens of the reference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from fake_cuda import FakeCuda, named
from test_programs import PROMPTS, compiled
from tiny_models import tiny

import elision
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.targets import TARGETS
from elision.errors import ArtefactError, BadInput
from elision.ir.drafting.policy import Always
from elision.runtime.cuda.driver import Cuda
from elision.runtime.cuda.natives import Natives
from elision.runtime.model import Model

PADDED = torch.tensor([PROMPTS[0], [0] * 5 + PROMPTS[1]])
MASK = torch.tensor([[1] * 8, [0] * 5 + [1] * 3])


def on_gpu(model: Model) -> tuple[Model, FakeCuda]:
    """The same model, generating on a GPU that is made up."""
    code = named(plan_program(model.program))
    fake = FakeCuda(code)
    facts = dict(tokenizer=None, defaults=model.defaults, coverage={}, max_context=model.max_context)
    return Model(model.program, model.weights, gpu=code, device=Cuda(code, fake), **facts), fake  # type: ignore[arg-type]


def both(model: Model, gpu: Model, **options: Any) -> tuple[list[list[int]], list[list[int]]]:
    found = gpu.generate(PADDED, MASK, **options).tolist()
    return found, model.generate(PADDED, MASK, **options).tolist()


def test_batches_greedy_and_sampled_and_what_ends_them() -> None:
    model = compiled("LlamaConfig", num_hidden_layers=2)
    gpu, fake = on_gpu(model)
    plain, expected = both(model, gpu, max_new_tokens=5, eos_token_id=[])
    assert plain == expected
    assert gpu.stats is not None and model.stats is not None
    assert (gpu.stats.new_tokens, gpu.stats.rounds, gpu.stats.turns) == (10, 4, 8) and gpu.stats.finish == ["length"] * 2
    assert gpu.stats.state_bytes > 0 and gpu.stats.prompt_tokens == 11
    eos = plain[0][10]
    found, expected = both(model, gpu, max_new_tokens=5, eos_token_id=eos, pad_token_id=39)
    assert found == expected and found[0] != plain[0] and gpu.stats.finish == model.stats.finish and "eos" in gpu.stats.finish
    assert fake.calls["cuGraphLaunch"] > 0
    before = fake.calls.copy()
    found, expected = both(model, gpu, max_new_tokens=5, min_new_tokens=3, eos_token_id=eos, pad_token_id=39)
    assert found == expected and 39 not in found[0][8:11]
    assert (fake.calls - before)["cuMemcpyDtoHAsync_v2"] == 1 + 2 * 2 + 2, "logits come until the end of sequences is allowed"


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_sampling(penalty: float) -> None:
    """With penalties on the host, without on the device."""
    model = compiled("LlamaConfig")
    gpu, fake = on_gpu(model)
    warp: dict[str, Any] = dict(do_sample=True, temperature=0.9, top_k=20, top_p=0.9, seed=[3, 9], num_return_sequences=2)
    found, expected = both(model, gpu, max_new_tokens=4, eos_token_id=[], repetition_penalty=penalty, **warp)
    assert found == expected and found[0] != found[1]


def test_a_round_asks_the_device_for_no_more_than_the_next_token() -> None:
    model = compiled("LlamaConfig")
    gpu, fake = on_gpu(model)
    seen: list[tuple[list[int], Any]] = []
    ids, options = torch.tensor(PROMPTS[:1]), dict[str, Any](max_new_tokens=5, eos_token_id=[])
    gpu.generate(ids, **options, streamer=lambda r, t, x: seen.append((t, fake.calls.copy())))
    expected = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=5, eos_token_id=[])[0, 8:].tolist()
    assert [t for t, _ in seen] == [[i] for i in expected]
    made = seen[-1][1] - seen[-2][1]
    assert {n: c for n, c in made.items() if n != "cuStreamSynchronize"} == {"cuGraphLaunch": 1, "cuMemcpyDtoHAsync_v2": 1}
    stopped: list[int] = []
    gpu.generate(ids, **options, streamer=lambda r, t, x: stopped.append(t[0]) or len(stopped) < 2)  # type: ignore[func-returns-value]
    assert stopped == expected[:2] and gpu.stats is not None and gpu.stats.finish == ["cancelled"]


@pytest.mark.parametrize("sampled", [False, True])
def test_drafts_of_tables(sampled: bool) -> None:
    """Made by the host, which merges what two drafters find, and verified on the device: the same tokens, drafts and
    acceptances."""
    model = compiled("LlamaConfig", ("prompt-lookup", "aded"))
    gpu, fake = on_gpu(model)
    for each in (model, gpu):
        assert each.drafting is not None
        each.drafting.policy = Always(3)
    ids = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=24, eos_token_id=[])  # it has begun to repeat itself
    options: dict[str, Any] = dict(max_new_tokens=4, eos_token_id=[], do_sample=sampled, temperature=1e-4 if sampled else None)
    found, expected = gpu.generate(ids, **options), model.generate(ids, **options)
    assert found.tolist() == expected.tolist()
    assert gpu.stats is not None and model.stats is not None and gpu.stats.drafted == model.stats.drafted > 0
    assert gpu.stats.accepted == model.stats.accepted and gpu.stats.rounds == model.stats.rounds


def test_rounds_of_more_nodes_than_a_word_has_bits() -> None:
    """Beyond the largest class of shapes, and more sequences than those that the device drafts for."""
    model = compiled("LlamaConfig", ("prompt-lookup:match=1",))
    gpu, _ = on_gpu(model)
    for each in (model, gpu):
        assert each.drafting is not None
        each.max_batch, each.drafting.policy = 33, Always(1)
    options = dict[str, Any](max_new_tokens=3, eos_token_id=[])
    ids = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=34, eos_token_id=[])[:, -4:].repeat(33, 1)  # it repeats itself
    assert gpu.generate(ids, **options).tolist() == model.generate(ids, **options).tolist()
    assert gpu.stats is not None and max(gpu.stats.sizes) == 66


def test_memory_of_a_run_is_given_back() -> None:
    model = compiled("LlamaConfig")
    gpu, fake = on_gpu(model)
    counts = []
    for _ in range(3):
        gpu.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=2, eos_token_id=[])
        graphs = fake.calls["cuGraphInstantiateWithFlags"] - fake.calls["cuGraphExecDestroy"]
        counts.append((fake.calls["cuMemAlloc_v2"] - fake.calls["cuMemFree_v2"], graphs))
    assert counts[1] == counts[2]


def test_graphs_are_of_all_their_caches() -> None:
    """One cache that is another now: launches with its old addresses are not started again."""
    made: list[Any] = []

    def graph(call: Any, caches: Any, entries: Any) -> Any:
        made.append(caches)
        return lambda: None

    natives: Any = Natives(SimpleNamespace(graph=graph))  # type: ignore[arg-type]
    call = SimpleNamespace(graphs=WeakKeyDictionary(), counts={0: 1}, longest={0: 1})
    a, b, c = (type("Cache", (), {})() for _ in range(3))
    for second in (b, b, c, c):
        natives._launch(call, {"a": a, "b": second})
    assert made == [{"a": a, "b": b}, {"a": a, "b": c}]


def test_prefixes_are_refused() -> None:
    model = compiled("LlamaConfig")
    gpu, _ = on_gpu(model)
    prefix = model.prefix(torch.arange(20))
    with pytest.raises(BadInput, match="on a GPU.*prefix"):
        gpu.generate(torch.tensor(PROMPTS[:1]), prefix=prefix)
    with pytest.raises(BadInput, match="on a GPU.*prefix"):
        gpu.prefix(torch.arange(20))


def test_an_artefact_generates_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("LlamaConfig")
    model.save(tmp_path / "plain.elision")
    with pytest.raises(ArtefactError, match="no code for GPUs"):
        elision.load(tmp_path / "plain.elision", device="cuda")
    with pytest.raises(BadInput, match="device='tpu'"):
        elision.load(tmp_path / "plain.elision", device="tpu")
    model.gpu = named(plan_program(model.program))
    model.save(tmp_path / "gpu.elision")
    monkeypatch.setattr("elision.runtime.cuda.driver.open_driver", lambda: FakeCuda(model.gpu))
    loaded = elision.load(tmp_path / "gpu.elision", device="cuda")
    ids = torch.tensor(PROMPTS[:1])
    assert loaded.generate(ids, max_new_tokens=3).tolist() == model.generate(ids, max_new_tokens=3).tolist()
    assert loaded.on_gpu and not elision.load(tmp_path / "gpu.elision").on_gpu


def test_what_has_no_kernel_is_refused_when_it_is_compiled() -> None:
    with pytest.raises(BadInput, match=r"does not run on a GPU: \w+ in \w+ has no kernel \(.*older entries stored as Repaired"):
        elision.compile(tiny("LlamaConfig"), passes=["gear"], target=TARGETS[1])
