"""Drafts without the host: a sequence's tree from its tokens so far or from a table (`elision.ir.drafting`), cut to the nodes
with the best chances; and what becomes of the tables when it has been verified.

The trees of a drafter are parts of one ``template i64[NODES, 3 + DEPTH]``: for each node its parent, depth, ancestor bits, and
the kinds of the guesses on the way to it, -1 behind them. In a call every sequence has as many nodes (``start``). Nodes for which
there is no guess have parent -2: they see themselves alone, and nothing accepts them.

``told i64[sequences, 4 + 3 NODES]`` is what the host reads of a round: nodes that were drafted, nodes that were accepted with the
root, the token after them, 0; the accepted tokens; the token of every node of the template (-1: no guess) and its kind.
"""

from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(0.02)  # `elision.ir.drafting.run`


@triton.jit
def draft_lookup(
    ids, pos, parent, anc, told, history, length, room, rates, template, start, capacity,
    NODES: tl.constexpr, DEPTH: tl.constexpr, MATCH: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Prompt lookup: what followed the last ``MATCH`` tokens of ``history i64[sequences, capacity]`` (or fewer) when they were
    there last; ``N`` is a power of two; program (sequence)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(start + row + 1) > tl.load(start + row):
        tokens = history + row * capacity
        end = tl.load(length + row).to(tl.int32)
        best = tl.full([BLOCK], -1, tl.int64)  # how many tokens agree, then where they end
        for begin in range(0, end - 1, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            agrees = at < end - 1
            many = tl.zeros([BLOCK], tl.int64)
            for j in tl.static_range(MATCH):
                agrees &= at >= j
                wanted = tl.load(tokens + tl.maximum(end - 1 - j, 0))
                agrees &= tl.load(tokens + at - j, mask=agrees, other=-1) == wanted
                many += agrees.to(tl.int64)
            best = tl.maximum(best, tl.where(many > 0, (many << 32) | at, -1))
        found = tl.max(best, 0)
        node = tl.arange(0, N)
        place = (found & 0xFFFFFFFF) + node
        inside = (found >= 0) & (node > 0) & (node < NODES) & (place < end)
        token = tl.load(tokens + place, mask=inside, other=-1)
        first = (tl.maximum(found >> 32, 1) - 1) * DEPTH
        chance = tl.full([N], 1.0, tl.float64)
        for d in range(0, DEPTH):
            chance *= tl.where(node > d, tl.load(rates + first + d), 1.0)
        _draft(
            ids, pos, parent, anc, told, tokens, end, room, template, start, row, token, first + node - 1, chance, NODES, DEPTH, N
        )


@triton.jit
def draft_recycled(
    ids, pos, parent, anc, told, history, length, room, rates, template, start, capacity, successors, steady,
    NODES: tl.constexpr, DEPTH: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Token recycling: the template's paths of ranks through ``successors i32[V, K]``; ``steady i8[V]``: how often in a row a
    token's first successor was the same; program (sequence)."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(start + row + 1) > tl.load(start + row):
        tokens = history + row * capacity
        end = tl.load(length + row).to(tl.int32)
        node = tl.arange(0, N)
        token = tl.zeros([N], tl.int64) + tl.load(tokens + end - 1)
        kind = tl.zeros([N], tl.int64)
        chance = tl.full([N], 1.0, tl.float64)
        for d in range(0, DEPTH):
            step = tl.load(template + node * (3 + DEPTH) + 3 + d, mask=node < NODES, other=-1)
            there = (step >= 0) & (token >= 0)
            found = step + tl.load(steady + token, mask=there, other=0)
            chance *= tl.load(rates + found, mask=there, other=1.0)
            after = tl.load(successors + token * K + step // 4 % K, mask=there, other=-1).to(tl.int64)
            token = tl.where(step >= 0, after, token)
            kind = tl.where(step >= 0, found, kind)
        _draft(ids, pos, parent, anc, told, tokens, end, room, template, start, row, token, kind, chance, NODES, DEPTH, N)


@triton.jit
def _draft(
    ids, pos, parent, anc, told, tokens, end, room, template, start, row, token, kind, chance,
    NODES: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Nodes ``[N]`` with a guess, at most ``room`` levels of them: the best by chance stay, of equal ones the first, and get the
    numbers that are left."""
    node, other = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = tl.arange(0, N)
    inside = at < NODES
    begin = tl.load(start + row)
    count = tl.load(start + row + 1) - begin
    template += at * (3 + DEPTH)
    depth = tl.load(template + 1, mask=inside, other=0)
    guessed = inside & (at > 0) & (token >= 0) & (depth <= tl.load(room + row))
    told += row * (4 + 3 * NODES)
    tl.store(told + 4 + NODES + at, tl.where(guessed, token, -1), mask=inside)
    tl.store(told + 4 + 2 * NODES + at, kind, mask=inside)
    worth = tl.where(guessed & (chance >= LEAST), chance, -1.0)
    mine, others = worth[:, None], worth[None, :]
    before = tl.sum(((others > mine) | ((others == mine) & (other < node))).to(tl.int32), 1)
    stays = (at == 0) | ((worth >= LEAST) & (before < count - 1))
    here = (stays[None, :] & (other < node)).to(tl.int64)
    place = tl.sum(here, 1)  # of those that stay, how many come before
    up = tl.load(template, mask=inside, other=-1)
    above = tl.sum(tl.where(other == up[:, None], place[None, :], 0), 1)
    bits = tl.load(template + 2, mask=inside, other=0)
    chain = ((bits[:, None] >> other) & 1 != 0) & stays[None, :]
    one = tl.full([N], 1, tl.int64)
    seen = tl.sum(tl.where(chain, (one << place)[None, :], 0), 1)
    last = tl.load(tokens + end - 1)
    tl.store(ids + begin + place, tl.where(at == 0, last, token), mask=stays)
    tl.store(pos + begin + place, end - 1 + depth, mask=stays)
    tl.store(parent + begin + place, tl.where(at == 0, -1, above), mask=stays)
    tl.store(anc + begin + place, seen, mask=stays)
    drafted = tl.sum(stays.to(tl.int64), 0)
    empty = (at >= drafted) & (at < count)
    tl.store(ids + begin + at, tl.zeros([N], tl.int64) + last, mask=empty)
    tl.store(pos + begin + at, tl.zeros([N], tl.int64) + end - 1, mask=empty)
    tl.store(parent + begin + at, tl.full([N], -2, tl.int64), mask=empty)
    tl.store(anc + begin + at, one << at, mask=empty)
    tl.store(told, drafted - 1)


@triton.jit
def recycle(successors, steady, ids, best, parent, K: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The likeliest tokens ``best i64[tokens, WIDE]`` after each node become the successors of its token; of nodes with equal
    tokens those of the first; program (node)."""
    node = tl.program_id(0)
    token = tl.load(ids + node)
    is_first = tl.load(parent + node) > -2
    for begin in range(0, node, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < node
        equal = inside & (tl.load(ids + at, mask=inside, other=-1) == token)
        is_first &= tl.sum((equal & (tl.load(parent + at, mask=inside, other=-2) > -2)).to(tl.int32), 0) == 0
    if is_first:
        successors += token * K
        top = tl.load(best + node * WIDE).to(tl.int32)
        often = tl.minimum(tl.load(steady + token).to(tl.int32) + 1, 3)
        tl.store(steady + token, tl.where(tl.load(successors) == top, often, 0).to(tl.int8))
        tl.debug_barrier()
        for k in tl.static_range(K):
            tl.store(successors + k, tl.load(best + node * WIDE + k).to(tl.int32))


@triton.jit
def take(
    told, history, length, ids, start, path, accepted, next, capacity,
    NODES: tl.constexpr, PATH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What was accepted joins the tokens of its sequence and is told; program (sequence)."""
    row = tl.program_id(0).to(tl.int64)
    many = tl.load(accepted + row)
    told += row * (4 + 3 * NODES)
    if many > 0:
        at = tl.arange(0, N)
        inside = at < many
        after = inside & (at + 1 < many)
        node = tl.load(path + row * PATH + at + 1, mask=after, other=0)
        answer = tl.load(next + row)
        token = tl.where(after, tl.load(ids + tl.load(start + row) + node, mask=after, other=0), answer)
        end = tl.load(length + row)
        tl.store(history + row * capacity + end + at, token, mask=inside & (end + at < capacity))
        tl.store(told + 4 + at, token, mask=inside & (at < NODES))
        tl.store(length + row, end + many)
        tl.store(told + 2, answer)
    tl.store(told + 1, many)
