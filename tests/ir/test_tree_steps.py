"""Tree steps, commit and clocked eviction or flush equal step-by-step decoding of the accepted path."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kv_cases import ARRANGEMENTS, append, evict_rows, flush_rows, kv, make, queries, same_lists, seg

from elision.ir.attend import attend
from elision.ir.mask import Mask
from elision.ir.states import Ring, Scratch
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

EVERY = 7
MASKS = [Mask(), Mask("window", 5), Mask("chunk", 4)]
CASES = ARRANGEMENTS | {"ring-small": (seg(Ring(3, 1, 1)),), "ring-no-spare": (seg(Ring(1, 0, 1)),)}
ACTIONS = {"evict": (evict_rows,), "flush": (flush_rows,), "both": (flush_rows, evict_rows)}


def tree(rng: random.Random, at: list[int]) -> tuple[Tokens, torch.Tensor]:
    """A random forest per row, that ends before the row's next tick; and what makes each node's token."""
    row, pos, parent, anc = [], [], [], []
    for b, start in enumerate(at):
        bits: list[int] = []
        depth: list[int] = []
        for node in range(rng.randint(0, 9)):
            up = rng.randint(max(-1, node - 3), node - 1)
            deep = depth[up] + 1 if up >= 0 else 0
            if start % EVERY + deep >= EVERY:
                up, deep = -1, 0
            bits.append((bits[up] if up >= 0 else 0) | 1 << node)
            depth.append(deep)
            row.append(b)
            parent.append(up)
        anc += bits
        pos += [start + d for d in depth]
    columns = [torch.tensor(x, dtype=torch.int64) for x in (row, pos, parent, anc)]
    return Tokens(columns[0], columns[1], len(at), columns[2], columns[3]), torch.tensor(
        [rng.randint(1, 50) for _ in row], dtype=torch.int64
    )


def accept(rng: random.Random, tokens: Tokens, b: int) -> list[int]:
    """A path from a root to a random node, often the deepest, sometimes empty."""
    mine = tokens.of_row(b).tolist()
    if not mine or rng.random() < 0.15:
        return []
    assert tokens.anc is not None
    leaf = max(mine, key=lambda i: int(tokens.pos[i])) if rng.random() < 0.5 else rng.choice(mine)
    return [j for j in range(len(mine)) if int(tokens.anc[leaf]) >> j & 1]


def tick(store: KVStore, rows: list[int], at: list[int], action: str) -> None:
    due = [b for b in rows if at[b] % EVERY == 0]
    for act in ACTIONS[action]:
        act(store, due)


@pytest.mark.parametrize("name", sorted(CASES))
@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.sampled_from(sorted(ACTIONS)),
    st.sampled_from(MASKS),
    st.sampled_from(["per_layer", "per_head"]),
)
def test_tree_steps_equal_sequential_decoding(
    name: str, seed: int, rows: int, action: str, mask: Mask, keep: str
) -> None:
    rng = random.Random(seed)
    trees, start = make(kv(*CASES[name], keep=keep), rows)
    steps, _ = make(kv(*CASES[name], keep=keep), rows)
    at = [start] * rows
    for _ in range(rng.randint(2, 8)):
        if max(at) > 22:
            break
        tokens, salt = tree(rng, at)
        if not len(tokens):
            continue
        append(trees, tokens, salt)
        guessed = attend(queries(tokens, salt), trees, tokens, mask, 0.7)[0]
        paths = [accept(rng, tokens, b) for b in range(rows)]
        trees.commit(paths)
        for b, path in enumerate(paths):
            mine = tokens.of_row(b)
            for node in path:
                i = mine[node : node + 1]
                one = Tokens(tokens.row[i], tokens.pos[i], rows)
                assert int(one.pos) == at[b]
                append(steps, one, salt[i])
                decoded = attend(queries(one, salt[i]), steps, one, mask, 0.7)[0]
                torch.testing.assert_close(guessed[i], decoded, rtol=0, atol=1e-12)
                at[b] += 1
                tick(steps, [b], at, action)
        tick(trees, [b for b in range(rows) if paths[b]], at, action)
        assert same_lists(trees, steps)
        assert torch.equal(trees.len["k"], steps.len["k"]) and torch.equal(trees.len["v"], steps.len["v"])


def test_drafting_in_several_calls_is_drafting_at_once() -> None:
    """A drafter may write its nodes one call at a time; a later call may bring only some of the nodes."""
    rng = random.Random(5)
    once, start = make(kv(*ARRANGEMENTS["dense"]), 2)
    append(once, Tokens.chunk([3, 5], [start, start]))
    apart = once.fork()
    tokens, salt = tree(rng, [3, 5])
    append(once, tokens, salt)
    whole = attend(queries(tokens, salt), once, tokens, Mask(), 0.7)[0]
    for i in range(len(tokens)):
        pick = torch.tensor([i])
        one = tokens.gather(pick)
        append(apart, one, salt[pick])
        found = attend(queries(one, salt[pick]), apart, one, Mask(), 0.7)[0]
        torch.testing.assert_close(found, whole[pick], rtol=0, atol=1e-12)


def test_sixty_four_nodes() -> None:
    """The last node's bit is the sign bit."""
    store = KVStore(kv(seg(Ring(80, 0, 64)), scratch=False), 1, 8, torch.float64)
    type = kv(seg(Ring(80, 0, 64)))
    chain = KVStore(replace(type, segments=(type.segments[0], seg(Scratch(64)))), 1, 8, torch.float64)
    n = torch.arange(64)
    anc = torch.where(n == 63, -1, (1 << (n + 1).clamp(max=63)) - 1)
    drafted = Tokens(torch.zeros(64, dtype=torch.int64), n, 1, n - 1, anc)
    plain = Tokens.chunk([64], [0])
    append(chain, drafted)
    append(store, plain)
    one = attend(queries(drafted), chain, drafted, Mask(), 0.7)[0]
    torch.testing.assert_close(one, attend(queries(plain), store, plain, Mask(), 0.7)[0], rtol=0, atol=1e-12)
    chain.commit([list(range(64))])
    assert same_lists(chain, store)
