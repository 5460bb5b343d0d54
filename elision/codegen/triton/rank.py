"""The page rank of tokens over the attention of a sequence, and those that go for being unimportant or similar
(`elision.ir.ops.ranking`; Zero-TPrune, Wang et al. 2023). One round is `looked.received` by the scores so far."""

from __future__ import annotations

import triton
import triton.language as tl

from elision.codegen.triton.select import among, least_of, sequence


@triton.jit
def uniform(weight, settled, start, H: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr):
    """``weight f32[tokens, H]``: the same for all tokens of a sequence, 1 in all; ``settled i32[tokens]``: 0 at the first token
    of each. Program (sequence)."""
    row = tl.program_id(0)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    head = tl.arange(0, HP)
    for at in range(begin, end, BN):
        token = at + tl.arange(0, BN)
        inside = (token < end)[:, None] & (head < H)[None, :]
        share = tl.zeros([BN, HP], tl.float32) + 1.0 / (end - begin).to(tl.float32)
        tl.store(weight + token[:, None] * H + head[None, :], share, mask=inside)
    if end > begin:
        tl.store(settled + begin, 0)


@triton.jit
def settle(settled, weight, before, start, least, H: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr):
    """A sequence whose scores were moved by less than ``least`` of their mean has settled; program (sequence)."""
    row = tl.program_id(0)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    head = tl.arange(0, HP)
    moved = tl.zeros([BN, HP], tl.float32)
    for at in range(begin, end, BN):
        token = at + tl.arange(0, BN)
        inside = (token < end)[:, None] & (head < H)[None, :]
        where = token[:, None] * H + head[None, :]
        step = tl.load(weight + where, mask=inside, other=0.0) - tl.load(before + where, mask=inside, other=0.0)
        moved = tl.maximum(moved, tl.abs(step))
    most = tl.max(tl.max(moved, 1), 0) * (end - begin).to(tl.float32)
    if (end > begin) & (most < least):
        tl.store(settled + begin, 1)


@triton.jit
def importance(score, weight, start, low, high, H: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr):
    """``score [tokens]``: the root of the mean square of heads whose scores, of mean 1, have a variance from ``low`` to ``high``
    (of all, if none has); program (sequence)."""
    row = tl.program_id(0)
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    count = tl.maximum((end - begin).to(tl.float32), 1.0)
    head = tl.arange(0, HP)
    total = tl.zeros([HP], tl.float32)
    for at in range(begin, end, BN):
        total += tl.sum(_scaled(weight, at, end, count, head, H, BN), 0)
    spread = tl.zeros([HP], tl.float32)
    for at in range(begin, end, BN):
        inside = (at + tl.arange(0, BN) < end)[:, None] & (head < H)[None, :]
        apart = tl.where(inside, _scaled(weight, at, end, count, head, H, BN) - (total / count)[None, :], 0.0)
        spread += tl.sum(apart * apart, 0)
    counts = ((spread / count >= low) & (spread / count <= high) & (head < H)).to(tl.float32)
    counts = tl.where(tl.sum(counts, 0) > 0, counts, (head < H).to(tl.float32))
    for at in range(begin, end, BN):
        token = at + tl.arange(0, BN)
        found = _scaled(weight, at, end, count, head, H, BN)
        mean = tl.sum(found * found * counts[None, :], 1) / tl.sum(counts, 0)
        tl.store(score + token, tl.sqrt(mean).to(score.dtype.element_ty), mask=token < end)


@triton.jit
def _scaled(weight, at, end, count, head, H: tl.constexpr, BN: tl.constexpr):
    """Scores of a tile of tokens, ``[BN, HP]``, times the tokens of the sequence."""
    token = at + tl.arange(0, BN)
    inside = (token < end)[:, None] & (head < H)[None, :]
    return tl.load(weight + token[:, None] * H + head[None, :], mask=inside, other=0.0) * count


@triton.jit
def halves(side, score, start, kept, twins, SKIP: tl.constexpr, BN: tl.constexpr):
    """``side i32[tokens]``, after the first ``SKIP`` of a sequence: 2 for the better half of those that are left when ``twins
    [sequences]`` more than stay are, 1 for the worse half, 0 for what goes now. Program (sequence)."""
    row = tl.program_id(0)
    begin, count, left = sequence(start, kept, row)
    left += tl.load(twins + row).to(tl.int32) - tl.minimum(count, SKIP)
    least, before = least_of(score, begin, count, left, 1, SKIP, 0, 0, BN)
    high, ahead = least_of(score, begin, count, (left + 1) // 2, 1, SKIP, 0, 0, BN)
    for at in range(0, count, BN):
        i = at + tl.arange(0, BN)
        found = among(score, begin, i, count, least, before, 1, SKIP, 0, 0).to(tl.int32)
        found += among(score, begin, i, count, high, ahead, 1, SKIP, 0, 0).to(tl.int32)
        tl.store(side + begin + i, found, mask=i < count)


@triton.jit
def remain(stays, side, best, start, kept, twins, SKIP: tl.constexpr, BN: tl.constexpr):
    """``stays i32[tokens]``: 1 for a token that goes, 2 for one that stays: the ``twins`` most similar (``best``) of ``side`` 1
    go after those of side 0. Program (sequence)."""
    row = tl.program_id(0)
    begin, count, left = sequence(start, kept, row)
    least, before = least_of(best, begin, count, tl.load(twins + row).to(tl.int32), 1, SKIP, 0, 0, BN)
    for at in range(0, count, BN):
        i = at + tl.arange(0, BN)
        inside = i < count
        alike = among(best, begin, i, count, least, before, 1, SKIP, 0, 0)
        here = (i < SKIP) | ((tl.load(side + begin + i, mask=inside, other=0) > 0) & ~alike)
        tl.store(stays + begin + i, 1 + here.to(tl.int32), mask=inside)


@triton.jit
def stand(assign, stays, to, count, BLOCK: tl.constexpr):
    """``assign i64[tokens]``: a token that stays stands for itself, another's place is taken by ``to``; program (run of ``BLOCK``
    tokens)."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    gone = tl.load(stays + token, mask=inside, other=2) == 1
    tl.store(assign + token, tl.where(gone, tl.load(to + token, mask=gone, other=0), token.to(tl.int64)), mask=inside)
