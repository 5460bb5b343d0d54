"""Scores of entries: what attention gives them, counted by hand; drafted and committed tokens count alike."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import DIM, VDIM, content, kv, queries, seg

from elision.ir.gumbel import noise
from elision.ir.mask import Mask
from elision.ir.observe import observe
from elision.ir.states import KV, Budget, Float, Gumbel, Scores
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack

F32 = Float("f32")
SCALE = 0.4


def cache(decay: float = 1.0, depth: int = 6, slots: Budget | None = None, keep: str = "per_layer", scratch: bool = True) -> KV:
    plain = kv(seg(slots or Budget(36), F32), keep=keep, scratch=scratch)
    return KV(**{**plain.__dict__, "scores": Scores(2, depth, decay)})


def append(store: KVStore, tokens: Tokens) -> None:
    mixed = tokens.pos + 1000 * tokens.row
    store.append(tokens, content(mixed, DIM, 0), content(mixed, VDIM, 5))


def probabilities(row: int, q_pos: int, k_pos: list[int]) -> torch.Tensor:
    """What the query at ``q_pos`` gives to entries at ``k_pos``, summed by cache head: ``[2, n]``."""
    q = queries(Tokens.chunk([0] * row + [1], [0] * row + [q_pos]))[0]
    keys = content(torch.tensor(k_pos) + 1000 * row, DIM, 0)
    return torch.stack([(SCALE * keys[:, h // 2] @ q[h]).softmax(0) for h in range(4)]).view(2, 2, -1).sum(1)


GUMBEL = Gumbel(3, 1.0, 0.7, 1.5, 4)


def noisy(row: int, q_pos: int, prompt: int) -> torch.Tensor:
    """As `probabilities` of all positions up to the query, by the noisy softmax."""
    k_pos = torch.arange(q_pos + 1)
    q = queries(Tokens.chunk([0] * row + [1], [0] * row + [q_pos]))[0]
    keys = content(k_pos + 1000 * row, DIM, 0)
    tau = 0.7 + 0.8 * min(1.0, max(0, q_pos - prompt + 1) / 4)
    found = []
    for h in range(4):
        g = noise(3, torch.tensor(h), torch.tensor(q_pos), k_pos).double()
        found.append(((SCALE * keys[:, h // 2] @ q[h] + g) / tau).softmax(0))
    return torch.stack(found).view(2, 2, -1).sum(1)


@given(st.lists(st.integers(1, 14), min_size=2, max_size=2), st.integers(1, 8))
@settings(max_examples=25, deadline=None)
def test_scores_of_a_noisy_softmax(lengths: list[int], chunk: int) -> None:
    """Of a prompt in any parts, and of the accepted path of a tree after it."""
    store = KVStore(KV(**{**cache().__dict__, "scores": Scores(2, 6, 1.0, GUMBEL)}), 2, 40, torch.float64)
    feed(store, lengths, chunk)
    paths = [[0, 1, 3, 4], [0, 1]]
    row, pos, parent, anc = pack([Tree(p) for p in ((-1, 0, 0, 1, 3, 2), (-1, 0, 1, 2))], lengths)
    at = Tokens(row, pos, 2, parent, anc)
    append(store, at)
    observe(queries(at), store, at, Mask(), SCALE)
    store.commit(paths)
    for b, (start, path) in enumerate(zip(lengths, paths, strict=True)):
        want = torch.zeros(2, start + len(path), dtype=torch.float64)
        for t in range(start + len(path)):
            want[:, : t + 1] += noisy(b, t, start)
        found = store.index["score"][b, :, : want.shape[1]].double()
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_noise_is_gumbel_noise() -> None:
    """Of its own for every head and pair of positions: mean, variance, and no correlation of neighbours in any direction."""
    at = torch.arange(200)
    g = noise(1, torch.arange(4).view(-1, 1, 1), at[:, None], at).double()
    assert abs(float(g.mean()) - 0.5772) < 0.01 and abs(float(g.var()) - math.pi**2 / 6) < 0.03
    for axis in range(3):
        a, b = g.narrow(axis, 0, g.shape[axis] - 1), g.narrow(axis, 1, g.shape[axis] - 1)
        assert abs(float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])) < 0.01
    assert not torch.equal(g, noise(2, torch.arange(4).view(-1, 1, 1), at[:, None], at).double())


def by_hand(row: int, n: int, decay: float, last: int = 0) -> torch.Tensor:
    score = torch.zeros(2, n, dtype=torch.float64)
    for t in range(n):
        score *= decay
        if not last or t >= n - last:
            score[:, : t + 1] += probabilities(row, t, list(range(t + 1)))
    return score


def feed(store: KVStore, lengths: list[int], chunk: int, last: int = 0) -> None:
    done = [0] * len(lengths)
    while done != lengths:
        counts = [min(chunk, n - d) for n, d in zip(lengths, done, strict=True)]
        at = Tokens.chunk(counts, done, lengths)
        append(store, at)
        observe(queries(at), store, at, Mask(), SCALE, last=last)
        done = [d + c for d, c in zip(done, counts, strict=True)]


@given(st.lists(st.integers(1, 14), min_size=1, max_size=3), st.integers(1, 8), st.sampled_from([1.0, 0.7]), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_prompt_counts_the_same_in_any_parts(lengths: list[int], chunk: int, decay: float, last: int) -> None:
    store = KVStore(cache(decay), len(lengths), 40, torch.float64)
    feed(store, lengths, chunk, last)
    for b, n in enumerate(lengths):
        want = by_hand(b, n, decay, last)
        torch.testing.assert_close(store.index["score"][b, :, :n].double(), want, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 6), st.sampled_from([1.0, 0.7]), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_accepted_drafts_count_as_tokens_one_by_one(length: int, decay: float, random: object) -> None:
    """A tree of six nodes, of which a path is accepted: the scores are those of the path's tokens committed one by one."""
    store = KVStore(cache(decay), 2, 40, torch.float64)
    feed(store, [length, length + 2], 4)
    parents = [(-1, 0, 0, 1, 3, 2), (-1, 0, 1, 2)]
    paths = [[0, 1, 3, 4], [0, 1]]
    row, pos, parent, anc = pack([Tree(p) for p in parents], [length, length + 2])
    at = Tokens(row, pos, 2, parent, anc)
    append(store, at)
    observe(queries(at), store, at, Mask(), SCALE)
    store.commit(paths)
    for b, (start, path) in enumerate(zip((length, length + 2), paths, strict=True)):
        n = start + len(path)
        torch.testing.assert_close(store.index["score"][b, :, :n].double(), by_hand(b, n, decay), atol=1e-5, rtol=1e-5)


def test_rejected_drafts_count_for_nothing() -> None:
    store = KVStore(cache(), 1, 40, torch.float64)
    feed(store, [5], 5)
    before = store.index["score"].clone()
    row, pos, parent, anc = pack([Tree((-1, 0, 1))], [5])
    at = Tokens(row, pos, 1, parent, anc)
    append(store, at)
    observe(queries(at), store, at, Mask(), SCALE)
    store.commit([[]])
    assert torch.equal(store.index["score"], before)


def test_scores_move_with_their_entries_and_new_ones_begin_at_zero() -> None:
    store = KVStore(cache(keep="per_head"), 2, 40, torch.float64)
    feed(store, [9, 7], 9)
    score = store.index["score"].clone()
    kept = torch.tensor([[[0, 2, 5, 8, -1], [1, 2, 3, 7, 8]]])
    store.select(kept, [0])
    assert store.lengths().tolist() == [[4, 5], [7, 7]]
    for h in range(2):
        at = store.pos[0, h, : int(store.len["k"][0, 0, h])].tolist()
        assert sorted(at) == [i for i in kept[0, h].tolist() if i >= 0]
        assert store.index["score"][0, h, : len(at)].tolist() == score[0, h, at].tolist()
    assert torch.equal(store.index["score"][1], score[1])
    append(store, Tokens.chunk([1, 0], [9, 7]))
    assert store.index["score"][0, 0, 4] == 0 and store.index["score"][0, 1, 5] == 0


def test_settling_gives_memory_back_and_keeps_what_is_there() -> None:
    type = cache(slots=Budget(6, -1, open=True))
    store = KVStore(type, 2, 40, torch.float64)
    assert store.segments[0].slots == 40
    feed(store, [20, 12], 8)
    store.select(torch.tensor([[[0, 1, 15, 17, 18, 19]], [[0, 2, 4, 9, 10, 11]]]))
    small = store.settled(12)
    assert small.segments[0].slots == 6 + 40 - 12 and small.bytes() < store.bytes()
    for a, b in ((store.entries("k", 6), small.entries("k", 6)), (store.entries("v", 6), small.entries("v", 6))):
        assert torch.equal(a, b)
    assert torch.equal(store.positions()[..., :6], small.positions()[..., :6])
    assert torch.equal(store.index["score"][..., :6], small.index["score"][..., :6])
    assert small.settled(12) is small
