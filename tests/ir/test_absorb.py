"""Merging evicted entries into kept ones: by hand."""

from __future__ import annotations

import torch
from kv_cases import DIM, VDIM, content, kv, seg

from elision.ir.absorb import absorb
from elision.ir.ops.choose import blend
from elision.ir.states import KV, Budget, Float, Scores
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

F32 = Float("f32")


def full(n: int) -> KVStore:
    plain = kv(seg(Budget(36), F32), keep="per_head")
    store = KVStore(KV(**{**plain.__dict__, "scores": Scores(2, local=0.5)}), 2, 40)
    at = Tokens.chunk([n, n], [0, 0])
    mixed = at.pos + 1000 * at.row
    store.append(at, content(mixed, DIM, 0).float(), content(mixed, VDIM, 5).float())
    for i, name in enumerate(("score", "local")):
        store.index[name].copy_(torch.rand(store.index[name].shape, generator=torch.Generator().manual_seed(i)))
    return store


def test_by_hand() -> None:
    """Two of the lists of one row; the other row is untouched."""
    n, candidates, least, near = 14, 4, 0.3, 5
    store, rows = full(n), torch.tensor([1])
    before = {what: store.entries(what, n).clone() for what in "kv"}
    scores = {name: store.index[name].clone() for name in ("score", "local")}
    kept = torch.tensor([[[1, 4, 7, 12, 13], [0, 3, 6, 9, -1]]])
    pos = store.positions()[rows]
    score = store.index["score"][rows, :, : pos.shape[-1]]
    absorb(store, score, pos, kept, rows, candidates, least, near)
    joined = 0
    for h in range(2):
        stays = [i for i in kept[0, h].tolist() if i >= 0]
        free = sorted((i for i in range(n) if i not in stays), key=lambda i: -float(score[0, h, i]))[:candidates]
        members: dict[int, list[int]] = {i: [i] for i in stays}
        for c in sorted(free):
            keys = before["k"][1, h]
            like = {i: float(torch.cosine_similarity(keys[c], keys[i], 0)) for i in stays if abs(i - c) <= near}
            if like and max(like.values()) >= least:
                members[max(like, key=lambda i: like[i])].append(c)
                joined += 1
        for i, group in members.items():
            w = score[0, h, group]
            for what in "kv":
                want = (before[what][1, h, group] * w[:, None]).sum(0) / w.sum()
                torch.testing.assert_close(store.entries(what, n)[1, h, i], want)
                assert bool((want <= before[what][1, h, group].amax(0) + 1e-6).all())
            for name, old in scores.items():
                torch.testing.assert_close(store.index[name][1, h, i], old[1, h, group].sum())
    assert joined >= 3
    assert torch.equal(store.entries("k", n)[0], before["k"][0]) and torch.equal(store.index["score"][0], scores["score"][0])


def test_a_cosine_beyond_one_merges_nothing() -> None:
    store, rows = full(10), torch.arange(2)
    before, pos = store.entries("k", 10).clone(), store.positions()
    absorb(store, store.index["score"][..., : pos.shape[-1]], pos, torch.arange(6).expand(2, 2, 6), rows, 4, 1.1, 100)
    assert torch.equal(store.entries("k", 10), before)


def test_a_blend_has_no_bias_for_age() -> None:
    """Entries that every later token gives the same weigh the same, however old; the rest goes by what is local."""
    pos = torch.tensor([[[0, 5, 9, -1]]])
    score, local = torch.tensor([[[10.0, 5.0, 1.0, 99.0]]]), torch.tensor([[[0.0, 3.0, 1.0, 99.0]]])
    assert torch.allclose(blend(score, local, pos, share=1.0), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))
    assert torch.allclose(blend(score, local, pos, share=0.0), torch.tensor([0, 0.75, 0.25, 0]))
    assert torch.allclose(blend(score, local, pos, share=0.5), torch.tensor([1 / 6, 13 / 24, 7 / 24, 0]))
