"""Eviction on the device: which entries stay, where they move, against the ops; and whole runs with methods that evict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import arrays, blocks, fill, kv
from test_generate import both, on_gpu
from test_programs import compiled

from elision.codegen.triton.evict import evict, move_scores
from elision.codegen.triton.forms import beside, form
from elision.codegen.triton.move import move
from elision.ir.ops.choose import keep, pool
from elision.ir.states import Budget, Float, Int, Scores
from elision.ir.store import KVStore


@pytest.mark.parametrize("pooled", [1, 5])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_the_best_stay(scored: bool, per_head: bool, pooled: int) -> None:
    """Three sequences, one of them not due, one too short; equal scores among them."""
    if pooled > 1 and not scored:
        return
    type = kv(2, 48, 48, Int(8, "channel", 16) if scored else Float("f32"), Budget(40), keyed_by="explicit",
              keep="per_head" if per_head else "per_layer", scores=Scores(2) if scored else None)  # fmt: skip
    stores = [KVStore(type, 4, 40) for _ in range(2)]
    for store in stores:
        fill(store, [37, 30, 7, 33])
        if scored:
            score = store.index["score"]
            score.copy_(torch.randint(0, 6, score.shape, generator=torch.Generator().manual_seed(1)))
    due, (n, recent, sinks) = torch.tensor([0, 2, 3]), (19, 5, 2)
    mine, other = stores
    pos = mine.positions()[due, : len(mine.groups)]
    score = pos
    if scored:
        score = mine.index["score"][due, :, : mine.pos.shape[2]]
        score = score if per_head else score.sum(1, keepdim=True)
    if pooled > 1:
        score = pool(score, pos, size=pooled, recent=3)
    mine.select(keep(score, pos, n=n, recent=recent, sinks=sinks), due)

    each, start = len(mine.groups), torch.tensor([0, 1, 1, 2, 3])
    source, target = torch.full((4, each, n), -7), torch.full((4, each, n), -7)
    wide = other.index["score"].shape[-1] if scored else 0
    fixed: dict[str, Any] = dict(H=2, LISTS=each)
    evict[(4 * each,)](
        source, target, other.index.get("score"), other.pos, start, other.len["k"], other.len["v"], other.pos.shape[2], wide, n,
        recent, sinks, SCORED=scored, POOL=pooled, POOL_RECENT=3 if pooled > 1 else 0, BN=16, **fixed,
    )  # fmt: skip
    to, room, groups = (*arrays(other, 0), other.pos), blocks(other) * 16, beside(form(type.main[0].k), 48)
    move[(n, 8)](
        *to, *to, source, target, None, n, room, room, other.pos.shape[2], other.pos.shape[2], W=48, WV=48, WP=64, WVP=64,
        FROM_LISTS=each, SHARED=False, GROUPS_K=groups, GROUPS_V=groups, GP=4, AFTER=False,
        **fixed,
    )  # fmt: skip
    if scored:
        move_scores[(2, 8)](other.index["score"], source, target, wide, n, BN=16, **fixed)
    assert torch.equal(mine.len["k"], other.len["k"]) and torch.equal(mine.len["v"], other.len["v"])
    count = mine.totals().max()
    assert int(mine.totals()[0].max()) == n and torch.equal(mine.positions(), other.positions())
    for what in "kv":
        there = mine.positions()[..., : int(count), None] >= 0
        assert torch.equal(mine.entries(what, int(count)) * there, other.entries(what, int(count)) * there)
    if scored:
        there = mine.positions() >= 0
        entries = mine.pos.shape[2]
        assert torch.equal(mine.index["score"][..., :entries] * there, other.index["score"][..., :entries] * there)


@pytest.mark.parametrize(
    "method", ["h2o:budget=8,recent=3,sinks=1,every=2", "snapkv:budget=6,window=2", "streaming-llm:window=5,sinks=1,every=2"]
)
def test_methods_that_evict(method: str) -> None:
    model = compiled("LlamaConfig", (method,), num_hidden_layers=1)
    gpu, _ = on_gpu(model)
    found, expected = both(model, gpu, max_new_tokens=7, eos_token_id=[])
    assert found == expected
    assert gpu.stats is not None and model.stats is not None and gpu.stats.state_bytes == model.stats.state_bytes
