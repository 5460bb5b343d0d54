"""Caches under Triton's interpreter: appending, counting, moving, committing; bit for bit what the ops do."""

from __future__ import annotations

import pytest
import torch
import triton
from caches import NODES, arrays, axis, blocks, fill, kv, older, trees

from elision.codegen.triton.append import advance, append
from elision.codegen.triton.choose import walk
from elision.codegen.triton.forms import beside, form
from elision.codegen.triton.move import move
from elision.ir.encoding import code_width
from elision.ir.ops.dense import rope
from elision.ir.states import Budget, Dense, Float, Int, Ring, Slots
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.verify import RULES, Request

ENCODINGS = [
    Float("f32"), Float("bf16"), Int(8, "channel", 16), Int(8, "channel", 48), Int(4, "channel", 48, zero=True),
    Int(2, "channel", 48),
]  # fmt: skip


def appended(store: KVStore, tokens: Tokens, k: torch.Tensor, v: torch.Tensor, freq: torch.Tensor | None, style: str) -> None:
    """Append by kernels, and count."""
    type, at, index = store.type, axis(tokens), store.index
    slots = type.main[-1].slots
    ring = isinstance(slots, Ring)
    segment = -1 if tokens.drafted else store.tail
    planes = arrays(store, segment)
    enc = type.main[-1].k
    append[(len(tokens), type.heads)](
        k, k.stride(0), v, v.stride(0), freq, at["row"], at["pos"], at.get("node"), at["start"], 1.0,
        *planes, store.pos, index["node_pos"], index["node_live"], store.len["k"][store.tail], older(store)[6],
        index.get("count"), blocks(store, segment),
        store.pos.shape[2], slots.sinks if ring else 0, store.segments[0].slots - slots.sinks if ring else 0,
        H=type.heads, D=type.dim, DV=type.vdim, DP=triton.next_power_of_2(type.dim), DVP=triton.next_power_of_2(type.vdim),
        LISTS=store.pos.shape[1], FORM_K=form(enc), FORM_V=form(enc), R=0 if freq is None else len(freq), STYLE=style,
        DRAFTED=tokens.drafted, RING=ring, NODES=NODES,
    )  # fmt: skip
    if not tokens.drafted:
        advance[(1,)](
            *(store.len[w][store.tail] for w in "kv"), index.get("count"), at["start"], store.rows, store.segments[0].slots,
            LISTS=store.pos.shape[1], RING=ring, COUNTS=False, BLOCK=16,
        )  # fmt: skip


def same(a: KVStore, b: KVStore, codes: int = 0, near: float = 1e-5) -> bool:
    """Whether two caches hold the same in every array, codes of integers up to ``codes``, floats up to ``near``."""
    ok = all(torch.equal(a.index[n], b.index[n]) for n in a.index)
    for s, t in zip(a.segments, b.segments, strict=True):
        for what in "kv":
            for name, x in s.planes[what].arrays.items():
                y = t.planes[what].arrays[name]
                ok &= (
                    bool(((x.int() - y.int()).abs() <= codes).all())
                    if x.dtype == torch.int8
                    else torch.allclose(x.float(), y.float(), near if x.dtype == torch.float32 else max(near, 1e-2), near)
                )
    return ok


@pytest.mark.parametrize(
    "encoding,slots", [*((e, Dense()) for e in ENCODINGS), *((e, Ring(6, 2, 12)) for e in ENCODINGS[::2])], ids=str
)
def test_append_in_parts(encoding: Float | Int, slots: Slots) -> None:
    stores = [KVStore(kv(2, 48, 48, encoding, slots), 3, 40) for _ in range(2)]
    starts = [0, 0, 0]
    for i, counts in enumerate([[5, 0, 9], [1, 1, 1], [7, 12, 0], [12, 3, 1]]):
        tokens, seed = Tokens.chunk(counts, starts), torch.Generator().manual_seed(i)
        starts = [s + n for s, n in zip(starts, counts, strict=True)]
        k, v = (torch.randn(len(tokens), 2, 48, generator=seed) + 4 for _ in "kv")  # nothing is as small as what pads a row
        stores[0].append(tokens, k, v)
        appended(stores[1], tokens, k, v, None, "half")
    assert same(*stores)


@pytest.mark.parametrize("style", ["half", "interleaved", "parted"])
@pytest.mark.parametrize("drafted", [False, True])
def test_keys_turn_on_the_way(style: str, drafted: bool) -> None:
    stores = [KVStore(kv(2, 16, 32, Int(8, "channel", 16)), 2, 40) for _ in range(2)]
    for store in stores:
        fill(store, [9, 4])
    tokens = trees(4, [11, 5], [9, 4]) if drafted else Tokens.chunk([3, 2], [9, 4])
    seed = torch.Generator().manual_seed(2)
    k, v = (torch.randn(len(tokens), 2, d, generator=seed) for d in (16, 32))
    freq = 10000.0 ** (-torch.arange(6) / 6)
    stores[0].append(tokens, rope(k, freq, style=style, at=tokens), v)
    appended(stores[1], tokens, k, v, freq, style)
    assert same(*stores, codes=1)


def moved(store: KVStore, source: torch.Tensor, target: torch.Tensor, frm: int, after: bool) -> None:
    """Move slots of a segment to the one that is appended to."""
    type, enc, tail = store.type, store.type.main[-1].k, store.tail
    scales, width = beside(form(enc), 48), code_width(enc, 48)
    to, other = arrays(store, tail), arrays(store, frm)
    pos = store.index["node_pos"] if frm else store.pos
    move[(source.shape[-1], store.rows * type.heads)](
        *to, store.pos, *other, pos, source, target, older(store)[6], source.shape[-1],
        blocks(store, tail) * 16, blocks(store, frm) * 16, store.pos.shape[2], pos.shape[-1],
        H=type.heads, W=width, WV=width, WP=64, WVP=64, LISTS=store.pos.shape[1],
        FROM_LISTS=1 if frm else store.pos.shape[1], SHARED=False, GROUPS_K=scales, GROUPS_V=scales, GP=4, AFTER=after,
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_eviction_fills_the_gaps(encoding: Float | Int) -> None:
    """One Budget segment, each head with entries of its own."""
    type = kv(2, 48, 48, encoding, Budget(40), keyed_by="explicit", keep="per_head")
    stores = [KVStore(type, 2, 40) for _ in range(2)]
    for store in stores:
        fill(store, [12, 9])
    keep = torch.tensor([[[0, 3, 4, 11], [5, 6, 8, 9]], [[1, 2, 8, -1], [0, 6, 7, -1]]])
    source, target = torch.full((2, 2, 4), -1), torch.full((2, 2, 4), -1)
    for b in range(2):
        for h in range(2):
            kept = [int(i) for i in keep[b, h] if i >= 0]
            late = [i for i in kept if i >= len(kept)]
            free = [i for i in range(len(kept)) if i not in kept]
            source[b, h, : len(late)], target[b, h, : len(free)] = torch.tensor(late), torch.tensor(free)
    stores[0].select(keep)
    moved(stores[1], source, target, 0, False)
    for w in "kv":
        stores[1].len[w].copy_(stores[0].len[w])
    assert same(*stores)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_greedy_round_on_the_device(encoding: Float | Int) -> None:
    """The walk through the trees, the accepted nodes to the cache, their number: what `verify` and `commit` do."""
    stores = [KVStore(kv(2, 48, 48, encoding), 3, 60) for _ in range(2)]
    tokens = trees(8, [30, 1, 12], [9, 4, 17])
    ids = torch.randint(0, 3, (len(tokens),), generator=torch.Generator().manual_seed(1))
    best = torch.randint(0, 3, (len(tokens),), generator=torch.Generator().manual_seed(2))
    seed = torch.Generator().manual_seed(3)
    k, v = (torch.randn(len(tokens), 2, 48, generator=seed) for _ in "kv")
    for store in stores:
        fill(store, [9, 4, 17])
        store.append(tokens, k, v)
    paths, following = [], []
    at = axis(tokens)
    for b in range(3):
        own = tokens.of_row(b)
        logits = torch.nn.functional.one_hot(best[own], 3).float()
        assert tokens.parent is not None
        path, token = RULES["greedy"](
            ids[own], tokens.parent[own].tolist(), 0, logits, torch.zeros(0, dtype=torch.int64), Request(), None
        )
        paths.append(path)
        following.append(token)
    path, accepted, next = torch.full((3, NODES), -7), torch.full((3,), -7), torch.full((3,), -7)
    walk[(3,)](path, accepted, next, ids, best, at["parent"], at["start"], NODES=NODES)
    assert [p[:n].tolist() for p, n in zip(path, accepted, strict=True)] == paths and next.tolist() == following
    assert max(map(len, paths)) > 2 and bool((path == -1).any())
    stores[0].commit(paths)
    moved(stores[1], path[:, None], stores[1].len["k"][0], len(stores[1].segments) - 1, True)
    advance[(1,)](stores[1].len["k"], stores[1].len["v"], None, accepted, 3, 0, LISTS=1, RING=False, COUNTS=True, BLOCK=16)
    stores[1].index["node_live"].zero_()
    assert same(*stores)


def test_a_sequence_that_is_not_in_the_call_has_no_path() -> None:
    path, accepted, next = (
        torch.zeros(2, NODES, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
    )
    one = torch.zeros(1, dtype=torch.int64)
    walk[(2,)](path, accepted, next, one, one + 5, one - 1, torch.tensor([0, 0, 1]), NODES=NODES)
    assert accepted.tolist() == [0, 1] and next.tolist() == [-1, 5] and path[0].tolist() == [-1] * NODES
