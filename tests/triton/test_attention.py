"""Attention under Triton's interpreter against the op's meaning: masks, trees, splits, sinks, caches of bytes, rings, scores."""

from __future__ import annotations

import pytest
import torch
import triton
from caches import arrays, attention, axis, blocks, fill, kv, near, queries, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from elision.codegen.triton.forms import form
from elision.codegen.triton.scores import key_scores, mass
from elision.ir.attend import attend as meaning
from elision.ir.mask import Mask
from elision.ir.observe import observe
from elision.ir.states import KV, Budget, Dense, Float, Int, Ring, Scores
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

F32, BF16 = Float("f32"), Float("bf16")
MASKS = [Mask(), Mask("full"), Mask("window", 5), Mask("window", 4, 2), Mask("chunk", 4)]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_ragged_prompt(mask: Mask, ordered: bool) -> None:
    """Tokens that are appended, not counted, among them none of one sequence."""
    type = kv(2, 16, 16, F32)
    store = KVStore(type, 3, 64)
    fill(store, [7, 3, 20], seed=1)
    before = {w: x.clone() for w, x in store.len.items()}
    tokens = fill(store, [13, 0, 6], [7, 3, 20], seed=2)
    q = queries(len(tokens), 6, 16)
    out, lse = meaning(q, store, tokens, mask, 0.25, results=("lse",))
    for name, x in before.items():
        store.len[name].copy_(x)
    found, norm = attention(q, store, tokens, mask, 0.25, pending=True, ordered=ordered)
    assert near(found, out) and near(norm, lse)


@pytest.mark.parametrize(
    "encoding,splits",
    [
        (F32, 1), (F32, 2), (BF16, 2), (Int(8, "channel", 48), 2), (Int(4, "channel", 16, zero=True), 1),
        (Int(2, "channel", 48), 2),
    ],
    ids=str,
)  # fmt: skip
def test_decoding_of_every_encoding(encoding: Float | Int, splits: int) -> None:
    type = kv(3, 48, 48, encoding)
    store = KVStore(type, 4, 80)
    tokens = fill(store, [70, 1, 33, 16])
    tokens = tokens.gather(torch.tensor([int(tokens.of_row(r)[-1]) for r in range(4)]))
    for dtype in (torch.float32, torch.bfloat16):
        q = queries(4, 9, 48, dtype)
        out, lse = meaning(q.float(), store, tokens, Mask(), 0.2, results=("lse",))
        found, norm = attention(q, store, tokens, Mask(), 0.2, splits=splits)
        assert near(found, out, 2e-2 if dtype == torch.bfloat16 else 1e-5) and near(
            norm, lse, 1e-2 if dtype == torch.bfloat16 else 1e-5
        )


@settings(max_examples=6)
@given(
    st.integers(0, 10**6), st.lists(st.integers(1, 20), min_size=1, max_size=2), st.sampled_from(MASKS), st.sampled_from([1, 2]),
    st.sampled_from([F32, Int(8, "channel", 16)]),
)  # fmt: skip
def test_trees_see_their_ancestors(seed: int, counts: list[int], mask: Mask, splits: int, encoding: Float | Int) -> None:
    lengths = [(seed + 7 * i) % 23 + 1 for i in range(len(counts))]
    store = KVStore(kv(2, 16, 32, encoding), len(counts), 40)
    fill(store, lengths, seed=seed)
    tokens = trees(seed, counts, lengths)
    generator = torch.Generator().manual_seed(seed + 1)
    store.append(tokens, *(torch.randn(len(tokens), 2, d, generator=generator) for d in (16, 32)))
    q = queries(len(tokens), 4, 16)
    out, lse = meaning(q, store, tokens, mask, 0.3, results=("lse",))
    found, norm = attention(q, store, tokens, mask, 0.3, splits=splits)
    assert near(found, out) and near(norm, lse)


def test_a_full_tree_of_64_nodes() -> None:
    store = KVStore(kv(1, 16, 16, F32), 1, 40)
    fill(store, [5])
    tokens = trees(3, [64], [5])
    store.append(tokens, *(torch.randn(64, 1, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2)))
    q = queries(64, 2, 16)
    assert near(attention(q, store, tokens, Mask(), 0.3, splits=2, bm=32)[0], meaning(q, store, tokens, Mask(), 0.3)[0])


@pytest.mark.parametrize("splits", [1, 2])
def test_softcap_sinks_and_slopes(splits: int) -> None:
    store = KVStore(kv(2, 16, 16, F32), 2, 40)
    tokens = fill(store, [21, 9])
    tokens = tokens.gather(torch.tensor([20, 29]))
    q = queries(2, 4, 16) * 4
    sinks, slopes = torch.tensor([0.5, -1.0, 3.0, 0.0]), torch.tensor([0.5, 0.25, 0.125, 0.0625])
    out, lse = meaning(q, store, tokens, Mask(), 0.5, 8.0, sinks, slopes, ("lse",))
    found, norm = attention(q, store, tokens, Mask(), 0.5, 8.0, sinks, slopes, splits=splits)
    assert near(found, out) and near(norm, lse)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_query_that_sees_nothing(splits: int) -> None:
    store = KVStore(kv(1, 16, 16, F32), 2, 40)
    fill(store, [4, 4], [10, 0])
    tokens = Tokens(torch.tensor([0, 1]), torch.tensor([3, 3]), 2)
    q = queries(2, 2, 16)
    out, lse = meaning(q, store, tokens, Mask(), 0.5, results=("lse",))
    found, norm = attention(q, store, tokens, Mask(), 0.5, splits=splits)
    assert bool((out[0] == 0).all()) and near(found, out) and torch.equal(norm[0], lse[0]) and near(norm[1], lse[1])


def test_a_ring_and_heads_that_keep_their_own_entries() -> None:
    store = KVStore(kv(2, 16, 16, F32, Ring(8, 2, 4)), 2, 40)
    tokens = fill(store, [19, 5])
    tokens = Tokens(torch.tensor([0, 1]), torch.tensor([18, 4]), 2)
    q = queries(2, 4, 16)
    assert near(attention(q, store, tokens, Mask(), 0.5)[0], meaning(q, store, tokens, Mask(), 0.5)[0])
    own = KVStore(kv(2, 16, 16, F32, Budget(40), keyed_by="explicit", keep="per_head"), 2, 40)
    fill(own, [12, 9])
    own.select(torch.tensor([[[0, 3, 4, 11], [5, 6, -1, -1]], [[1, 2, 8, -1], [0, 1, 2, 3]]]))
    tokens = Tokens(torch.tensor([0, 1]), torch.tensor([12, 9]), 2)
    assert near(attention(q, own, tokens, Mask(), 0.5, splits=2)[0], meaning(q, own, tokens, Mask(), 0.5)[0])


def scored(
    type: KV,
    q: torch.Tensor,
    store: KVStore,
    tokens: Tokens,
    lse: torch.Tensor,
    score: torch.Tensor,
    mask: Mask,
    last: int,
    add: bool,
) -> None:
    at, g = axis(tokens), q.shape[1] // type.heads
    k, _, ks, _, low, _ = arrays(store, 0)
    decay = type.scores.decay if type.scores is not None else 1.0
    key_scores[(-(-store.pos.shape[2] // 16), tokens.rows * type.heads)](
        score, q, q.stride(0), at["pos"], at["start"], at["ahead"], lse, None, k, ks, low, store.pos, store.len["k"],
        blocks(store),
        store.pos.shape[2], score.shape[2], 0.25, 0.0, mask.size, mask.sinks, decay, last, *(None,) * 4,
        H=type.heads, G=g, GP=triton.next_power_of_2(g), D=type.dim, DP=16, LISTS=store.pos.shape[1],
        FORM_K=form(type.main[0].k), NOISY=False, MASK=mask.kind, SOFTCAP=False, SLOPES=False, PENDING=False, ADD=add, BM=16,
        BN=16,
    )  # fmt: skip


@pytest.mark.parametrize("mask", [Mask(), Mask("window", 4, 2)], ids=str)
def test_mass_from_the_saved_lse(mask: Mask) -> None:
    type = kv(2, 16, 16, Int(8, "channel", 16))
    store = KVStore(type, 2, 48)
    tokens = fill(store, [30, 11])
    q = queries(len(tokens), 6, 16)
    out, lse, expected = meaning(q, store, tokens, mask, 0.25, results=("lse", "mass"))
    found = torch.full_like(expected, torch.nan)
    scored(type, q, store, tokens, lse, found, mask, 0, False)
    assert near(found, expected)


def test_mass_from_what_decoding_kept() -> None:
    store = KVStore(kv(2, 16, 16, F32), 3, 48)
    fill(store, [30, 11, 40])
    tokens = Tokens(torch.arange(3), torch.tensor([29, 10, 39]), 3)
    q = queries(3, 4, 16)
    out, lse, expected = meaning(q, store, tokens, Mask("window", 9), 0.25, results=("lse", "mass"))
    kept = torch.full((3, 4, 48), torch.nan)
    found, norm = attention(q, store, tokens, Mask("window", 9), 0.25, splits=2, kept=kept, ordered=True)
    score = torch.full_like(expected, torch.nan)
    given = (kept, norm, axis(tokens)["start"], store.len["k"], 48, 48, 0.5, *(None,) * 9)
    fixed = dict(H=2, G=2, LISTS=1, PENDING=False, NOISY=False, BN=16)
    mass[(3, 6)](score, *given, ADD=False, **fixed)
    assert near(found, out) and near(score, expected)
    mass[(3, 6)](score, *given, ADD=True, **fixed)
    assert near(score, 1.5 * expected)
    score.fill_(8.0)  # what an entry that was evicted has left where a new one is now
    store.len["k"] -= 1
    mass[(3, 6)](score, *given, ADD=True, **{**fixed, "PENDING": True})
    for b, n in enumerate((30, 11, 40)):
        assert near(score[b, :, : n - 1], 4 + expected[b, :, : n - 1]) and near(score[b, :, n - 1], expected[b, :, n - 1])


@pytest.mark.parametrize("decay,last", [(1.0, 0), (0.9, 0), (1.0, 4)])
def test_scores_of_a_prompt(decay: float, last: int) -> None:
    type = kv(2, 16, 16, F32, Dense(), scores=Scores(2, decay=decay))
    store = KVStore(type, 2, 48)
    tokens = fill(store, [20, 7])
    tokens = Tokens.chunk([20, 7], [0, 0], [22, 7])
    store.index["score"][..., :20] = torch.rand(2, 2, 20, generator=torch.Generator().manual_seed(1))
    found, q = store.index["score"].clone(), queries(27, 4, 16)
    _, lse = meaning(q, store, tokens, Mask(), 0.25, results=("lse",))
    scored(type, q, store, tokens, lse, found, Mask(), last, True)
    observe(q, store, tokens, Mask(), 0.25, last=last)
    for b, n in enumerate([20, 7]):
        assert near(found[b, :, :n], store.index["score"][b, :, :n])
