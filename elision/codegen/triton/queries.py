"""The queries of a program: some tokens of one sequence times the query heads of one cache head, which read the same keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(start, row, first, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr):
    """For each of ``BM`` rows of a tile, token by token and in it head by head (``GP``: heads with padding): the token of the
    axis, the head in the group, and whether it is there. ``first``: rank in the sequence of the first token."""
    m = tl.arange(0, BM)
    rank = first + m // GP
    begin, end = tl.load(start + row), tl.load(start + row + 1)
    return begin + rank, m % GP, (begin + rank < end) & (m % GP < G)


@triton.jit
def load(q, token, head, there, stride, D: tl.constexpr, DP: tl.constexpr):
    """Queries ``[BM, DP]``; ``stride``: elements from token to token."""
    channel = tl.arange(0, DP)[None, :]
    inside = there[:, None] if DP == D else there[:, None] & (channel < D)
    return tl.load(q + token[:, None] * stride + head[:, None] * D + channel, mask=inside, other=0.0)


@triton.jit
def waiting(row, node, DEPTH: tl.constexpr):
    """The place of a drafted token among those that wait for a commit."""
    return row * DEPTH + tl.minimum(node, DEPTH - 1)
