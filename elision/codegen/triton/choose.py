"""The best of many numbers, and the path through a tree of drafts that they allow, without leaving the device."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def best_of_tile(value, index, x, N: tl.constexpr, TILES: tl.constexpr, K: tl.constexpr, BN: tl.constexpr):
    """The ``K`` largest of each run of ``BN`` logits ``x [tokens, N]`` and where they are, of equals the first; program (tile,
    token)."""
    token = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    found = tl.load(x + token * N + at, mask=at < N, other=float("-inf")).to(tl.float32)
    where = (token * TILES + tl.program_id(0)) * K
    left = at < N
    for k in tl.static_range(K):
        top = tl.max(tl.where(left, found, float("-inf")), 0)
        first = tl.min(tl.where((found == top) & left, at, N), 0)
        tl.store(value + where + k, top)
        tl.store(index + where + k, first.to(tl.int64))
        left &= at != first


@triton.jit
def best_of_tiles(best, value, index, N: tl.constexpr, TILES: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """``best i64[tokens, K]`` of the tiles' own, ``BT`` at least ``TILES K``; program (token)."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BT)
    found = tl.load(value + token * (TILES * K) + place, mask=place < TILES * K, other=float("-inf"))
    at = tl.load(index + token * (TILES * K) + place, mask=place < TILES * K, other=N)
    left = at < N
    for k in tl.static_range(K):
        top = tl.max(tl.where(left, found, float("-inf")), 0)
        first = tl.min(tl.where((found == top) & left, at, N), 0)
        tl.store(best + token * K + k, tl.minimum(first, N - 1))
        left &= at != first


@triton.jit
def walk(path, accepted, next, ids, best, parent, start, NODES: tl.constexpr):
    """Verification: from the root, while a node has a child that holds the token of its own (of equal children the first): the
    likeliest, or one that was drawn.

    ``path i64[sequences, NODES]``: the accepted nodes, the root first, then -1; ``accepted i64[sequences]``: how many; ``next``:
    the token after them, -1 for a sequence that is not in the call. ``ids``, ``best``, ``parent [tokens]``; program
    (sequence)."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(start + row)
    count = tl.load(start + row + 1) - begin
    node = tl.arange(0, NODES)
    inside = node < count
    token = tl.load(ids + begin + node, mask=inside, other=-1)
    before = tl.load(parent + begin + node, mask=inside, other=-2)
    wanted = tl.load(best + begin + node, mask=inside, other=-1)
    found = tl.full([NODES], -1, tl.int64)
    at = tl.zeros([], tl.int64) + tl.where(count > 0, 0, NODES)
    length = tl.zeros([], tl.int64)
    answer = tl.full([], -1, tl.int64)
    for _ in range(0, count):
        if at < NODES:
            found = tl.where(node == length, at, found)
            answer = tl.sum(tl.where(node == at, wanted, 0), 0)
            length += 1
            at = tl.min(tl.where(inside & (before == at) & (token == answer), node, NODES), 0).to(tl.int64)
    tl.store(path + row * NODES + node, found)
    tl.store(accepted + row, length)
    tl.store(next + row, answer)


@triton.jit
def follow(ids, pos, row, best, next, tokens, length, count, most, BLOCK: tl.constexpr):
    """A step of plain decoding has been done: the ``best i64[count]`` of each sequence is its ``next i64[sequences]``. ``tokens
    i64[sequences, most]`` takes the token at ``length i64[sequences]``, which is counted; program (run of ``BLOCK`` tokens)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token, b = tl.load(best + at, mask=inside, other=0), tl.load(row + at, mask=inside, other=0)
    n = tl.load(length + b, mask=inside, other=0)
    tl.store(tokens + b * most + n, token, mask=inside & (n < most))
    tl.store(length + b, n + 1, mask=inside)
    tl.store(next + b, token, mask=inside)
    tl.store(ids + at, token, mask=inside)
    tl.store(pos + at, tl.load(pos + at, mask=inside, other=0) + 1, mask=inside)
