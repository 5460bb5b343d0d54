"""Caches of two segments under Triton's interpreter, older entries as codes behind a tail of floats: what the ops do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from caches import arrays, attention, blocks, fill, kv, near, older, queries, trees
from test_caches import appended, moved, same
from test_generate import on_gpu
from test_programs import compiled

from elision.codegen.triton.flush import flush, flushed, move_up
from elision.codegen.triton.forms import form
from elision.ir.attend import attend as meaning
from elision.ir.drafting.policy import Always
from elision.ir.mask import Mask
from elision.ir.states import KV, Budget, Dense, Float, Int, Segment
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens


def behind(dim: int, vdim: int, bits: int = 4, group: int = 16, channels: int = 16, tail: str = "f32") -> KV:
    """Older entries in codes, keys by groups of rows and values by groups of channels."""
    whole = kv(2, dim, vdim, Float(tail), Budget(60))
    first = Segment(Dense(), Int(bits, "token", group, zero=True), Int(bits, "channel", channels, zero=True))
    return KV(2, dim, vdim, (first, *whole.segments))


def filled(type: KV, lengths: list[int], blocks_: int = 32, keep: int = 5, seed: int = 0) -> KVStore:
    """Some entries, whole blocks of them in the first segment."""
    store = KVStore(type, len(lengths), 80)
    fill(store, lengths, seed=seed)
    for row, n in enumerate(lengths):
        if moves := max(n - keep, 0) // blocks_ * blocks_:
            store.flush(torch.tensor([row]), 1, 0, moves, "kv")
    return store


@pytest.mark.parametrize(
    "bits,dim,vdim,channels,mask", [(2, 48, 16, 16, Mask()), (4, 16, 48, 48, Mask("window", 19)), (8, 16, 16, 16, Mask())]
)
def test_attention_to_both(bits: int, dim: int, vdim: int, channels: int, mask: Mask) -> None:
    """Of a token of each sequence, one of them with no older entries, in one part and in three; then of a tree of drafts."""
    lengths = [50, 60, 9]
    store = filled(behind(dim, vdim, bits, 16, channels), lengths)
    assert store.len["k"][:, :, 0].tolist() == [[32, 32, 0], [18, 28, 9]]
    tokens = Tokens(torch.arange(3), torch.tensor(lengths) - 1, 3)
    q = queries(3, 6, dim)
    out, lse = meaning(q, store, tokens, mask, 0.25, results=("lse",))
    for splits, ordered in ((1, True), (4, False)):
        found, norm = attention(q, store, tokens, mask, 0.25, splits=splits, ordered=ordered)
        assert near(found, out) and near(norm, lse)
    tokens = trees(3, [6, 2, 5], lengths)
    store.append(tokens, *(torch.randn(len(tokens), 2, d, generator=torch.Generator().manual_seed(d)) for d in (dim, vdim)))
    q = queries(len(tokens), 6, dim)
    assert near(attention(q, store, tokens, mask, 0.3, splits=2)[0], meaning(q, store, tokens, mask, 0.3)[0])


def test_a_prompt_that_goes_on() -> None:
    """Its tokens are appended to the tail and not counted yet."""
    store = filled(behind(16, 16), [50, 3])
    before = store.len["k"].clone()
    tokens = fill(store, [7, 4], [50, 3], seed=2)
    q = queries(len(tokens), 4, 16)
    out = meaning(q, store, tokens, Mask(), 0.25)[0]
    store.len["k"].copy_(before)
    for ordered in (False, True):
        assert near(attention(q, store, tokens, Mask(), 0.25, pending=True, ordered=ordered)[0], out)


def test_tokens_and_accepted_drafts_go_to_the_tail() -> None:
    stores = [filled(behind(48, 48), [50, 60, 9]) for _ in range(2)]
    tokens = Tokens.chunk([3, 0, 2], [50, 60, 9])
    k, v = (torch.randn(len(tokens), 2, 48, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    stores[0].append(tokens, k, v)
    appended(stores[1], tokens, k, v, None, "half")
    assert same(*stores)
    tokens = trees(3, [3, 1, 2], [53, 60, 11])
    for store in stores:
        store.append(tokens, torch.ones(len(tokens), 2, 48), torch.ones(len(tokens), 2, 48))
    paths = [[0, 1], [0], []]
    path = torch.tensor([p + [-1] * (64 - len(p)) for p in paths])
    moved(stores[1], path[:, None], stores[1].len["k"][1], 2, True)
    stores[0].commit(paths)
    assert torch.equal(stores[0].pos, stores[1].pos)
    for a, b in zip(arrays(stores[0], 1), arrays(stores[1], 1), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("bits,dim,vdim,channels,tail", [(2, 48, 16, 16, "f32"), (4, 16, 48, 48, "bf16"), (8, 16, 32, 16, "f32")])
def test_whole_blocks_are_encoded(bits: int, dim: int, vdim: int, channels: int, tail: str) -> None:
    """Twice, so that blocks join others; of sequences of which one is not due, one too short; more stays than goes, and less."""
    type = behind(dim, vdim, bits, 16, channels, tail)
    stores = [filled(type, [58, 40, 20, 60], 16, 40) for _ in range(2)]
    assert stores[0].len["k"][0, :, 0].tolist() == [16, 0, 0, 16]
    for store in stores:
        for plane in store.segments[1].planes.values():
            plane.arrays["codes"] += 4  # nothing is as small as what pads a row
    for keep, due in ((11, [0, 2, 3]), (0, [0, 1, 2])):
        mine, other = stores
        tails = mine.len["k"][1, :, 0]
        for row in due:
            if n := int((tails[row] - keep).clamp(min=0)) // 16 * 16:
                mine.flush(torch.tensor([row]), 1, 0, n, "kv")
        start = torch.tensor([sum(d < i for d in due) for i in range(5)])
        k, v, *_ = arrays(other, 1)
        planes, rest = older(other)[:6], older(other)[7:]
        length, older_other = other.len["k"][1], other.len["v"][0]
        sizes: dict[str, Any] = dict(
            H=2, D=dim, DV=vdim, DP=triton.next_power_of_2(dim), DVP=triton.next_power_of_2(vdim), BLOCK=16
        )  # fmt: skip
        forms = dict(OLDER_K=form(type.main[0].k), OLDER_V=form(type.main[0].v))
        flush[(4, 8)](*planes, k, v, start, length, other.len["k"][0], keep, blocks(other, 1), *rest, **sizes, **forms)
        move_up[(8,)](k, v, start, length, keep, blocks(other, 1), **sizes)
        flushed[(1,)](length, other.len["v"][1], other.len["k"][0], older_other, start, 4, keep, BLOCK=16, BN=8)
        assert all(torch.equal(mine.len[w], other.len[w]) for w in "kv")
        for s, t in zip(mine.segments[:2], other.segments[:2], strict=True):
            for what in "kv":
                n = mine.len[what][mine.segments.index(s), :, 0]
                for row in range(4):
                    found, expected = (
                        x.planes[what].read_all(int(n[row]), torch.float32, torch.tensor([row])) for x in (t, s)
                    )
                    assert torch.equal(found, expected)


@pytest.mark.parametrize("passes", [("kivi:bits=2,group=16,residual=0",), ("kivi:bits=4,group=16,residual=0", "prompt-lookup")])
def test_a_model_whose_cache_is_encoded_behind_a_tail(passes: tuple[str, ...]) -> None:
    """A block is full after the prompt, while some rows stay, and one as tokens come, by rounds of drafts too."""
    model = compiled("LlamaConfig", passes)
    gpu, fake = on_gpu(model)
    for each in (model, gpu):
        if each.drafting is not None:
            each.drafting.policy = Always(3)
    ids = torch.randint(0, 40, (1, 29), generator=torch.Generator().manual_seed(3))
    if len(passes) > 1:  # what repeats itself can be drafted
        ids = model.generate(ids[:, :8], max_new_tokens=21, eos_token_id=[])
    found, expected = (m.generate(ids, max_new_tokens=5, eos_token_id=[]).tolist() for m in (gpu, model))
    assert found == expected and fake.device.launches["flush"] == 2
    assert gpu.stats is not None and model.stats is not None and gpu.stats.state_bytes == model.stats.state_bytes
    assert gpu.stats.accepted == model.stats.accepted and (len(passes) == 1 or gpu.stats.accepted > 0)
