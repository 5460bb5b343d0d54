"""Scores under Triton's interpreter: of a noisy softmax, and of drafted tokens, against the ops; then whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import NODES, arrays, attention, axis, blocks, fill, kv, near, queries, trees
from test_generate import on_gpu
from test_programs import compiled

from elision.codegen.triton.credit import credit
from elision.codegen.triton.noise import noisy_kept, noisy_keys, noisy_waiting
from elision.codegen.triton.scores import key_scores, mass
from elision.ir.attend import attend as meaning
from elision.ir.drafting.policy import Always
from elision.ir.mask import Mask
from elision.ir.observe import observe
from elision.ir.states import KV, Budget, Float, Gumbel, Scores
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

GUMBEL = Gumbel(3, 1.0, 0.7, 1.5, 9)
NOISE = (GUMBEL.seed, GUMBEL.amplitude, GUMBEL.start)
LATER = (*NOISE, GUMBEL.end, GUMBEL.steps)
NONE: tuple[None, ...] = (None,) * 5


def scored_cache(gumbel: Gumbel | None, decay: float = 1.0, per_head: bool = False) -> KV:
    return kv(
        2, 16, 16, Float("f32"), Budget(48), scores=Scores(2, NODES, decay, gumbel), keep="per_head" if per_head else "per_layer",
        keyed_by="explicit",
    )  # fmt: skip


def equal_scores(store: KVStore, score: torch.Tensor, rtol: float = 1e-5) -> bool:
    return all(near(score[b, :, :n], store.index["score"][b, :, :n], rtol) for b, n in enumerate(store.totals()[:, 0].tolist()))


@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_a_prompt_by_a_noisy_softmax(decay: float) -> None:
    store = KVStore(scored_cache(GUMBEL, decay), 3, 48)
    tokens = fill(store, [20, 0, 7])
    score, prompt = store.index["score"].clone(), torch.zeros(3, dtype=torch.int64)
    q, at = queries(27, 4, 16), axis(tokens)
    _, lse = meaning(q, store, tokens, Mask(), 0.25, results=("lse",))
    k, _, ks, _, low, _ = arrays(store, 0)
    shared: tuple[Any, ...] = (None, k, ks, low, store.pos, store.len["k"], blocks(store), 48)
    sizes: dict[str, Any] = dict(
        H=2, G=2, GP=2, D=16, DP=16, LISTS=1, FORM_K="", MASK="causal", SOFTCAP=False, SLOPES=False, PENDING=False, BM=16, BN=16
    )  # fmt: skip
    norm = torch.full((27, 4), torch.nan)
    given = (q, q.stride(0), at["pos"], at["start"])
    noisy_keys[(3, 6)](norm, prompt, *given, lse, *shared, 0.25, 0.0, 0, 0, *NOISE, **sizes)
    key_scores[(3, 6)](
        score, *given, at["ahead"], lse, *shared, 48, 0.25, 0.0, 0, 0, decay, 0, norm, *NOISE, ADD=True, NOISY=True, **sizes
    )
    observe(q, store, tokens, Mask(), 0.25)
    assert equal_scores(store, score) and prompt.tolist() == [20, 0, 7]
    assert not near(score[0, :, :20], store.index["score"][0, :, :20] + 1e-3)


@pytest.mark.parametrize("prompts", [[12, 30], [2, 3]], ids=["rising", "hot"])
def test_a_decoded_token_by_a_noisy_softmax(prompts: list[int]) -> None:
    store = KVStore(scored_cache(GUMBEL, 0.5), 2, 48)
    fill(store, [14, 31])
    tokens = Tokens(torch.arange(2), torch.tensor([13, 30]), 2)
    store.index["prompt"].copy_(torch.tensor(prompts))
    store.index["score"].copy_(torch.rand(2, 2, 48, generator=torch.Generator().manual_seed(1)))
    score, q, at = store.index["score"].clone(), queries(2, 4, 16), axis(tokens)
    kept, norm = torch.full((2, 4, 48), torch.nan), torch.full((2, 4), torch.nan)
    _, lse = attention(q, store, tokens, Mask(), 0.25, splits=2, kept=kept)
    more = (at["pos"], store.pos)
    sizes: dict[str, Any] = dict(H=2, G=2, LISTS=1, PENDING=False, BN=16)
    noisy_kept[(2, 4)](norm, kept, lse, at["row"], *more, store.len["k"], 48, store.index["prompt"], *LATER, **sizes)
    mass[(3, 4)](
        score, kept, lse, at["start"], store.len["k"], 48, 48, 0.5, norm, *more, store.index["prompt"], *LATER, ADD=True,
        NOISY=True, **sizes,
    )  # fmt: skip
    observe(q, store, tokens, Mask(), 0.25, decoding=True)
    assert equal_scores(store, score)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("gumbel,decay,per_head", [(None, 1.0, False), (None, 0.8, True), (GUMBEL, 0.9, False)])
def test_drafts_count_when_they_are_accepted(gumbel: Gumbel | None, decay: float, per_head: bool, splits: int) -> None:
    """Of three sequences, of which one has no drafts and one accepts its root alone; what waited before is overwritten."""
    lengths = [9, 33, 20]
    stores = [KVStore(scored_cache(gumbel, decay, per_head), 3, 48) for _ in range(2)]
    tokens = trees(8, [12, 1, 4], lengths)
    tokens = tokens.gather((tokens.row != 1).nonzero().flatten())
    k, v = (torch.randn(len(tokens), 2, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    q = queries(len(tokens), 4, 16)
    for store in stores:
        fill(store, lengths)
        store.index["score"].copy_(torch.rand(3, 2, 48, generator=torch.Generator().manual_seed(1)))
        if gumbel is not None:
            store.index["prompt"].copy_(torch.tensor([4, 30, 20]))
        store.append(tokens, k, v)
    mine, other = stores
    observe(q, mine, tokens, Mask(), 0.25)
    for name in ("waiting", "waiting_nodes", "waiting_norm"):
        other.index[name].fill_(torch.nan)
    found, _ = attention(q, other, tokens, Mask(), 0.25, splits=splits)
    assert near(found, meaning(q, other, tokens, Mask(), 0.25)[0])
    assert tokens.parent is not None
    deep = int(tokens.parent[tokens.row == 0].argmax())
    path = [deep]
    while path[0]:
        path.insert(0, int(tokens.parent[path[0]]))
    paths = [path, [], [0]]
    assert len(path) > 2
    lines, accepted = torch.tensor([p + [-1] * (NODES - len(p)) for p in paths]), torch.tensor([len(p) for p in paths])
    index, lists = other.index, other.pos.shape[1]
    given = (index["waiting"], index["waiting_nodes"], index["waiting_norm"], lines, accepted, other.pos, index["node_pos"],
             other.len["k"], 48, 48)  # fmt: skip
    sizes: dict[str, Any] = dict(H=2, G=2, LISTS=lists, DEPTH=NODES, NODES=NODES, BN=16)
    noise: tuple[Any, ...] = (None, *NONE) if gumbel is None else (index["prompt"], *LATER)
    if gumbel is not None:
        noisy_waiting[(NODES, 12)](*given, *noise, **sizes)
    credit[(3, 6)](index["score"], *given, decay, *noise, NOISY=gumbel is not None, **sizes)
    mine.commit(paths)
    assert equal_scores(mine, index["score"])


@pytest.mark.parametrize(
    "passes",
    [
        ("h2o:budget=8,recent=3,sinks=1,every=2", "prompt-lookup"),
        ("keyformer:budget=8,recent=3,sinks=1,steps=6,every=2", "prompt-lookup"),
        pytest.param(("keyformer:budget=8,recent=3,sinks=1,steps=6,every=2",), marks=pytest.mark.nightly),
        pytest.param(("a2sf:budget=8,recent=3,alpha=0.9,every=2", "token-recycling:nodes=6"), marks=pytest.mark.nightly),
    ],
    ids=" ".join,
)
def test_methods_that_score_drafts(passes: tuple[str, ...]) -> None:
    model = compiled("LlamaConfig", passes)
    gpu, fake = on_gpu(model)
    for each in (model, gpu):
        if each.drafting is not None:
            each.drafting.policy = Always(3)
    ids = model.generate(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]), max_new_tokens=20, eos_token_id=[])  # it repeats itself
    found, expected = (m.generate(ids, max_new_tokens=6, eos_token_id=[]).tolist() for m in (gpu, model))
    assert found == expected
    assert gpu.stats is not None and model.stats is not None and gpu.stats.accepted == model.stats.accepted
    assert len(passes) == 1 or fake.device.launches["credit"] > 0 and gpu.stats.accepted > 0
    assert gpu.stats.state_bytes == model.stats.state_bytes
