from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_cases import (
    ARRANGEMENTS,
    CAPACITY,
    CHANNEL4,
    CHANNEL8,
    F64,
    HEADS,
    TOKEN8,
    VDIM,
    append,
    content,
    evict_rows,
    flush_rows,
    is_ring,
    kv,
    logical,
    loose,
    make,
    queries,
    same_lists,
    seg,
)

from elision.errors import BadInput, IllegalProgram
from elision.ir.array_store import ArrayStore
from elision.ir.attend import attend
from elision.ir.mask import Mask
from elision.ir.states import Array, Budget, Dense, Float, Journal, Paged, Ring, Snapshot
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

MASKS = [Mask(), Mask("full"), Mask("window", 5), Mask("chunk", 4)]
NAMES = st.sampled_from(sorted(ARRANGEMENTS))
SEEDS = st.integers(0, 10**6)


def allowed(mask: Mask, i: int, j: int) -> bool:
    """The masks, written a second time."""
    before = {
        "causal": True,
        "window": i - j < mask.size,
        "chunk": i // max(mask.size, 1) == j // max(mask.size, 1),
    }
    return mask.kind == "full" or (j <= i and before[mask.kind])


def plain_attention(
    q: torch.Tensor,
    store: KVStore,
    tokens: Tokens,
    mask: Mask,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One query at a time over the logical list: out, lse and mass."""
    group, lists = q.shape[1] // HEADS, logical(store)
    out, lse = (
        torch.zeros(len(q), q.shape[1], VDIM, dtype=q.dtype),
        torch.zeros(len(q), q.shape[1], dtype=q.dtype),
    )
    mass = torch.zeros(store.rows, HEADS, store.pos.shape[2], dtype=q.dtype)
    slots = store.type.main[-1].slots
    for t in range(len(q)):
        b, i = int(tokens.row[t]), int(tokens.pos[t])
        for hq in range(q.shape[1]):
            pos, k, v = lists[b * HEADS + hq // group]
            prefix = len(pos) - int(store.len["k"][-1, b, 0])
            keys, values, scores, where = [], [], [], []
            for j, p in enumerate(pos.tolist()):
                gone = isinstance(slots, Ring) and j >= prefix and p >= slots.sinks and i - p >= slots.window
                if allowed(mask, i, p) and not gone:
                    keys.append((p, k[j]))
                    values.append(v[j])
                    where.append(j)
            if tokens.anc is not None and store.type.scratch is not None:
                for node, p in enumerate(store.index["node_pos"][b].tolist()):
                    gone = isinstance(slots, Ring) and p >= slots.sinks and i - p >= slots.window
                    if int(tokens.anc[t]) >> node & 1 and allowed(mask, i, p) and not gone:
                        keys.append((p, store.drafted("k", 16)[b, hq // group, node]))
                        values.append(store.drafted("v", 16)[b, hq // group, node])
            for p, key in keys:
                s = float(q[t, hq] @ key) * scale
                s = softcap * float(torch.tanh(torch.tensor(s / softcap, dtype=q.dtype))) if softcap else s
                scores.append(s + (float(slopes[hq]) * (p - i) if slopes is not None else 0.0))
            logits = torch.tensor(scores + ([float(sinks[hq])] if sinks is not None else []), dtype=q.dtype)
            lse[t, hq] = torch.logsumexp(logits, 0) if len(logits) else -torch.inf
            weights = torch.softmax(logits, 0)[: len(scores)]
            if len(values):
                out[t, hq] = weights @ torch.stack(values)
                mass[b, hq // group, where] += weights[: len(where)]
    return out, lse, mass


def random_life(
    name: str, seed: int, rows: int, keep: str, poison: float | None = None
) -> tuple[KVStore, list[int]]:
    """A cache after random ragged appends, flushes and evictions, and each row's next position."""
    rng = random.Random(seed)
    store, start = make(kv(*ARRANGEMENTS[name], keep=keep), rows, poison)
    at = [start] * rows
    for _ in range(rng.randint(1, 7)):
        counts = [rng.randint(0, 5) for _ in range(rows)]
        append(store, Tokens.chunk(counts, at))
        at = [p + n for p, n in zip(at, counts, strict=True)]
        some = [b for b in range(rows) if rng.random() < 0.6]
        rng.choice([flush_rows, evict_rows, lambda *_: None])(store, some)
    return store, at


def draft(rng: random.Random, at: list[int]) -> Tokens:
    row, pos, parent, anc = [], [], [], []
    for b, p in enumerate(at):
        bits: list[int] = []
        depth: list[int] = []
        for node in range(rng.randint(0, 6)):
            up = rng.randint(-1, node - 1)
            bits.append((bits[up] if up >= 0 else 0) | 1 << node)
            depth.append(depth[up] + 1 if up >= 0 else 0)
            row.append(b)
            parent.append(up)
        anc += bits
        pos += [p + d for d in depth]
    columns = [torch.tensor(x, dtype=torch.int64) for x in (row, pos, parent, anc)]
    return Tokens(columns[0], columns[1], len(at), columns[2], columns[3])


@pytest.mark.parametrize("name", sorted(ARRANGEMENTS))
@given(
    SEEDS, st.integers(1, 3), st.sampled_from(["per_layer", "per_head"]), st.sampled_from(MASKS), st.data()
)
@settings(max_examples=10)
def test_attend_is_plain_softmax_attention(
    name: str, seed: int, rows: int, keep: str, mask: Mask, data: st.DataObject
) -> None:
    store, at = random_life(name, seed, rows, keep)
    rng, drafted = random.Random(seed), data.draw(st.booleans())
    tokens = draft(rng, at) if drafted else Tokens.chunk([rng.randint(0, 3) for _ in at], at)
    if not len(tokens):
        tokens = Tokens.chunk([1] * rows, at)
    append(store, tokens)
    gen = torch.Generator().manual_seed(seed)
    sinks = torch.randn(2 * HEADS, generator=gen, dtype=torch.float64) if data.draw(st.booleans()) else None
    slopes = torch.rand(2 * HEADS, generator=gen, dtype=torch.float64) if data.draw(st.booleans()) else None
    cap = data.draw(st.sampled_from([None, 0.8]))
    q = queries(tokens)
    found = attend(q, store, tokens, mask, 0.6, cap, sinks, slopes, ("lse", "mass"))
    for x, y in zip(found, plain_attention(q, store, tokens, mask, 0.6, cap, sinks, slopes), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ARRANGEMENTS))
@given(SEEDS, st.integers(1, 3), st.sampled_from(["per_layer", "per_head"]))
@settings(max_examples=8)
def test_unwritten_slots_do_not_matter(name: str, seed: int, rows: int, keep: str) -> None:
    found = []
    for poison in (1e4, -7.5):
        store, at = random_life(name, seed, rows, keep, poison)
        written = store.written
        assert written is not None and torch.equal(written.sum(-1), store.lengths())
        tokens = draft(random.Random(seed), at)
        if not len(tokens):
            tokens = Tokens.chunk([1] * rows, at)
        append(store, tokens)
        found.append(attend(queries(tokens), store, tokens, Mask(), 0.6, results=("lse", "mass")))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("name", sorted(ARRANGEMENTS))
@given(SEEDS, st.integers(1, 3), st.sampled_from(["per_layer", "per_head"]))
@settings(max_examples=8)
def test_entries_are_the_rows_that_were_appended(name: str, seed: int, rows: int, keep: str) -> None:
    """Every entry holds the key and value of its position: exactly in Float, within the encodings' error
    otherwise."""
    store, _ = random_life(name, seed, rows, keep)
    exact = all(isinstance(e, Float) for s in store.type.main for e in (s.k, s.v))
    shared = 8 if store.type.segments[0].shared else 0
    for i, (pos, k, v) in enumerate(logical(store)):
        b, h = divmod(i, HEADS)
        assert is_ring(store.type) or loose(store) or bool((pos[1:] > pos[:-1]).all())
        for x, salt, shared_salt in ((k, 0, 9), (v, 5, 11)):
            own = content(pos + 1000 * b, x.shape[1], salt)
            first = content(pos, x.shape[1], shared_salt)
            wanted = torch.where((pos < shared)[:, None, None], first, own)[:, h]
            torch.testing.assert_close(x, wanted, rtol=0, atol=0 if exact else 0.2)


@given(SEEDS, st.integers(1, 3))
def test_ring_holds_sinks_and_window(seed: int, rows: int) -> None:
    store, at = random_life("ring", seed, rows, "per_layer")
    for i, (pos, _, _) in enumerate(logical(store)):
        end = at[i // HEADS]
        assert set(pos.tolist()) >= set(range(min(2, end))) | set(range(max(0, end - 6), end))


@given(NAMES, SEEDS, st.integers(1, 3))
def test_rejected_drafts_leave_no_trace(name: str, seed: int, rows: int) -> None:
    store, at = random_life(name, seed, rows, "per_layer")
    before = store.fork()
    tokens = draft(random.Random(seed), at)
    append(store, tokens)
    if len(tokens):
        attend(queries(tokens), store, tokens, Mask(), 0.6)
    store.commit([[] for _ in range(rows)])
    for a, b in zip(store.segments[:-1], before.segments[:-1], strict=True):
        for what in "kv":
            for x, y in zip(a.planes[what].arrays.values(), b.planes[what].arrays.values(), strict=True):
                assert torch.equal(x, y)
        assert a.held == b.held and (a.table is None or torch.equal(a.table, b.table))
    for array in ("pos", "len_k", "len_v", "node_live"):
        assert torch.equal(store.index[array], before.index[array])


@given(NAMES, SEEDS)
def test_fork_is_independent(name: str, seed: int) -> None:
    store, at = random_life(name, seed, 2, "per_layer")
    before, other = store.fork(), store.fork()
    append(other, Tokens.chunk([1, 2], at))
    assert not same_lists(store, other)
    assert same_lists(store, before)
    append(store, Tokens.chunk([1, 2], at))
    assert same_lists(store, other)


def test_recode_changes_type_and_bytes() -> None:
    store, _ = make(kv(seg(Dense()), seg(Budget(8)), scratch=False), 2)
    append(store, Tokens.chunk([8, 8], [0, 0]))
    store.flush([0, 1], 1, 0, 8)
    before, size = logical(store), store.bytes()
    store.recode(0, TOKEN8, CHANNEL4)
    assert store.type.segments[0] == seg(Dense(), TOKEN8, CHANNEL4) and store.bytes() < size
    for (p, k, v), (p2, k2, v2) in zip(before, logical(store), strict=True):
        assert torch.equal(p, p2) and not torch.equal(k, k2)
        torch.testing.assert_close((k2, v2), (k, v), rtol=0, atol=0.1)


def test_recoding_the_tail_recodes_scratch() -> None:
    store, _ = make(kv(seg(Dense())), 1)
    append(store, Tokens.chunk([5], [0]))
    store.recode(0, CHANNEL8, CHANNEL4)
    assert store.type.scratch is not None and (store.type.scratch.k, store.type.scratch.v) == (
        CHANNEL8,
        CHANNEL4,
    )
    direct = store.fork()
    append(direct, Tokens.chunk([1], [5]))
    append(store, Tokens(torch.tensor([0]), torch.tensor([5]), 1, torch.tensor([-1]), torch.tensor([1])))
    store.commit([[0]])
    assert same_lists(store, direct)


def test_pages_come_back() -> None:
    store, _ = make(kv(seg(Paged(4))), 2)
    free = len(store.segments[0].free)
    append(store, Tokens.chunk([20, 3], [0, 0]))
    assert len(store.segments[0].free) == free - 6
    store.select(torch.tensor([[[0, 7, 19]]]), [0])
    assert len(store.segments[0].free) == free - 2
    assert store.positions()[0, 0, :4].tolist() == [0, 7, 19, -1]


def test_an_ancestor_that_skipped_this_layer_is_not_seen() -> None:
    """Round two drafts node 1 only; what round one left at node 0 is not its ancestor."""
    store, _ = make(kv(seg(Dense())), 1)
    append(store, Tokens.chunk([2], [0]))
    one = Tokens(torch.tensor([0]), torch.tensor([2]), 1, torch.tensor([-1]), torch.tensor([1]))
    append(store, one)
    store.commit([[]])
    second = Tokens(torch.tensor([0]), torch.tensor([3]), 1, torch.tensor([0]), torch.tensor([3]))
    append(store, second)
    found = attend(queries(second), store, second, Mask(), 0.6)[0]
    plain, _ = make(kv(seg(Dense())), 1)
    append(plain, Tokens.chunk([2], [0]))
    last = Tokens.chunk([1], [3])
    append(plain, last)
    torch.testing.assert_close(found, attend(queries(last), plain, last, Mask(), 0.6)[0], rtol=0, atol=1e-12)


def test_nothing_visible_gives_zeros() -> None:
    store, _ = make(kv(seg(Dense())), 1)
    tokens = Tokens.chunk([1], [0])
    out, lse = attend(queries(tokens), store, tokens, Mask(), 1.0, results=("lse",))
    assert not bool(out.any()) and bool((lse == -torch.inf).all())


def test_half_precision_is_computed_in_float32() -> None:
    store = KVStore(kv(seg(Dense(), Float("bf16"))), 1, CAPACITY)
    tokens = Tokens.chunk([9], [0])
    append(store, tokens)
    q = queries(tokens).bfloat16()
    out = attend(q, store, tokens, Mask(), 0.5)[0]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(q.float(), store, tokens, Mask(), 0.5)[0].bfloat16())


def illegal(rule: str, do: object) -> None:
    with pytest.raises(IllegalProgram) as caught:
        do()  # type: ignore[operator]
    assert caught.value.rule == rule


def test_what_the_type_forbids_is_refused() -> None:
    grouped, _ = make(kv(*ARRANGEMENTS["token+tail"]), 1)
    append(grouped, Tokens.chunk([10], [0]))
    illegal("encoding", lambda: grouped.flush([0], 1, 0, 3))
    grouped.flush([0], 1, 0, 8)
    illegal("encoding", lambda: grouped.select(torch.tensor([[[0, 1, 2, 8, 9]]])))
    illegal("encoding", lambda: grouped.select(torch.tensor([[[0, 1, 2, 5, 9]]])))
    illegal("encoding", lambda: grouped.select(torch.tensor([[[2, 3, 4, 5, 9]]])))
    grouped.select(torch.tensor([[[4, 5, 6, 7, 9]]]))
    assert grouped.positions()[0, 0, :6].tolist() == [4, 5, 6, 7, 9, -1]
    illegal("address", lambda: grouped.select(torch.tensor([[[0, 1, 2, 3], [0, 1, 2, 4]]])))
    ring, _ = make(kv(*ARRANGEMENTS["ring"]), 1)
    append(ring, Tokens.chunk([4], [0]))
    illegal("address", lambda: ring.select(torch.tensor([[[0, 2]]])))
    prefix, _ = make(kv(*ARRANGEMENTS["prefix+dense"]), 1)
    append(prefix, Tokens.chunk([4], [8]))
    illegal("address", lambda: prefix.select(torch.tensor([[[0, 1, 8]]])))
    illegal("address", lambda: prefix.flush([0], 1, 0, 2))
    illegal("address", lambda: prefix.recode(0, CHANNEL8, CHANNEL8))
    odd, _ = make(kv(seg(Dense()), seg(Dense())), 1)
    append(odd, Tokens.chunk([6], [0]))
    odd.flush([0], 1, 0, 6)
    illegal("encoding", lambda: odd.recode(0, TOKEN8, F64))


def test_visible_but_unwritten_is_illegal() -> None:
    store, _ = make(kv(seg(Dense())), 1, poison=3.0)
    append(store, Tokens.chunk([2], [0]))
    for length in store.len.values():
        length += 1
    tokens = Tokens.chunk([1], [2])
    illegal("validity", lambda: attend(queries(tokens), store, tokens, Mask(), 1.0))


def test_bad_input_is_refused() -> None:
    store, _ = make(kv(seg(Budget(4)), scratch=False), 1)
    with pytest.raises(BadInput, match="are full"):
        append(store, Tokens.chunk([5], [0]))
    assert not bool(store.lengths().any())
    with pytest.raises(BadInput, match="no Scratch"):
        append(store, draft(random.Random(2), [0, 0]))
    ring, _ = make(kv(seg(Ring(4, 0, 2))), 1)
    with pytest.raises(BadInput, match="at most 2"):
        append(ring, Tokens.chunk([3], [0]))
    with pytest.raises(BadInput, match="not all of them were drafted"):
        ring.commit([[0]])
    with pytest.raises(BadInput, match="ascending"):
        append(store, Tokens.chunk([3], [0]))
        store.select(torch.tensor([[[1, 0]]]))
    with pytest.raises(BadInput, match="caller's"):
        KVStore(replace(store.type, storage="external"), 1, 4)
    with pytest.raises(BadInput, match="expected as the tail"):
        KVStore(replace(ring.type, segments=(seg(Dense(), CHANNEL8), ring.type.segments[-1])), 1, 4)
    with pytest.raises(BadInput, match="cut token groups"):
        make(kv(seg(Paged(6), TOKEN8), seg(Dense())), 1)
    with pytest.raises(BadInput, match="unknown mask"):
        Mask("window")
    assert [str(m) for m in MASKS] == ["causal", "full", "window(5)", "chunk(4)"]


def test_array_states() -> None:
    tokens = Tokens.chunk([2, 1], [0, 0])
    values = torch.arange(3.0)[:, None]
    plain = ArrayStore(Array((1,), init=-1.0), 3)
    plain.write(Tokens(tokens.row, tokens.pos, 3), values)
    assert plain.read().flatten().tolist() == [1.0, 2.0, -1.0]
    drafted = Tokens(tokens.row, tokens.pos, 2, torch.tensor([-1, 0, -1]), torch.tensor([1, 3, 1]))
    illegal("retract", lambda: plain.write(drafted, values))
    journal = ArrayStore(Array((1,), undo=Journal(2)), 2)
    journal.write(drafted, values + 5)
    assert not bool(journal.read().any())
    other = journal.fork()
    journal.commit([[0], []])
    assert journal.read().flatten().tolist() == [5.0, 0.0]
    other.commit([[0, 1], [0]])
    assert other.read().flatten().tolist() == [6.0, 7.0]
    shallow = ArrayStore(Array((1,), undo=Journal(1)), 2)
    with pytest.raises(BadInput, match="below its depth"):
        shallow.write(drafted, values)
    snapshot = ArrayStore(Array((1,), undo=Snapshot()), 2)
    snapshot.checkpoint()
    snapshot.write(drafted, values + 5)
    assert snapshot.read().flatten().tolist() == [6.0, 7.0]
    snapshot.commit([[0], [0]])
    assert snapshot.read().flatten().tolist() == [0.0, 7.0]
