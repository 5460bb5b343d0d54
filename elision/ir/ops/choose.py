"""Which entries of a cache to keep: what it holds, their scores, and the best of them."""

from __future__ import annotations

import torch

from elision.ir.op import need, op, token_axis
from elision.ir.states import KV
from elision.ir.store import KVStore
from elision.ir.types import Axis, Tensor


def _entries_type(S: KV, rows: Tensor) -> Tensor:
    return Tensor((token_axis(rows), S.heads if S.keep == "per_head" else 1, Axis("entries")), "i64")


@op(_entries_type)
def entries(S: KVStore, rows: torch.Tensor) -> torch.Tensor:
    """Positions ``[b, heads or 1, entries]`` held by the sequences ``rows [b]``, in logical order; -1 where there is none. The
    heads share them unless the cache has keep=per_head."""
    return S.positions()[rows, : len(S.groups)]


def _scored_type(S: KV, rows: Tensor, *, which: str = "score") -> Tensor:
    need(S.scores is not None and which in S.scores.arrays, f"expected a cache with scores of the kind {which}")
    return _entries_type(S, rows).with_dtype("f32")


@op(_scored_type)
def scored(S: KVStore, rows: torch.Tensor, *, which: str = "score") -> torch.Tensor:
    """The score ``[b, heads or 1, entries]`` of every entry (or its ``local`` one), summed over heads that share entries."""
    found = S.index[which][rows, :, : S.pos.shape[2]]
    return found if len(S.groups) > 1 else found.sum(1, keepdim=True)


def _blend_type(score: Tensor, local: Tensor, pos: Tensor, *, share: float) -> Tensor:
    need(score.axes == pos.axes == local.axes and len(pos.axes) == 3, f"expected [b, heads, entries] thrice, got {score}, {pos}")
    need(0 <= share <= 1, f"share={share}; expected 0 to 1")
    return score


@op(_blend_type)
def blend(score: torch.Tensor, local: torch.Tensor, pos: torch.Tensor, *, share: float) -> torch.Tensor:
    """``share`` of the scores, each divided by the number of tokens since its position, and the rest of the local ones; both are
    scaled to sum to 1 (EMS, Li et al. 2024). 0 where there is no entry."""
    there = pos >= 0
    seen = pos.amax(-1, keepdim=True) - pos + 1
    parts = (torch.where(there, x, 0) for x in (score / seen.clamp(min=1), local))
    overall, near = (x / x.sum(-1, keepdim=True).clamp(min=1e-30) for x in parts)
    return share * overall + (1 - share) * near


def _pool_type(score: Tensor, pos: Tensor, *, size: int, recent: int = 0) -> Tensor:
    need(score.axes == pos.axes and len(pos.axes) == 3, f"expected [b, heads, entries] twice, got {score}, {pos}")
    need(size >= 1 and size % 2 == 1, f"size={size}; expected an odd number")
    need(recent >= 0, f"recent={recent}; expected at least 0")
    return score


@op(_pool_type)
def pool(score: torch.Tensor, pos: torch.Tensor, *, size: int, recent: int = 0) -> torch.Tensor:
    """Each score replaced by the mean of the ``size`` scores around it in order of position (what is beyond the ends, and
    the last ``recent`` positions, count as 0), so that neighbours of what is looked at are kept too (SnapKV, Li et al. 2024)."""
    there = pos >= 0
    counted = there & (pos <= pos.amax(-1, keepdim=True) - recent)
    order = torch.argsort(torch.where(there, pos, torch.iinfo(torch.int64).max), dim=-1, stable=True)
    line = torch.where(counted, score, 0).gather(-1, order)
    smooth = torch.nn.functional.avg_pool1d(line, size, 1, size // 2)
    return torch.empty_like(score).scatter_(-1, order, smooth)


def _keep_type(score: Tensor, pos: Tensor, *, n: int, recent: int = 0, sinks: int = 0) -> Tensor:
    need(score.axes == pos.axes and len(pos.axes) == 3, f"expected [b, heads, entries] twice, got {score}, {pos}")
    need(n >= recent + sinks, f"n={n} is less than recent={recent} + sinks={sinks}")
    return pos.with_axes(*pos.axes[:2], n)


@op(_keep_type)
def keep(score: torch.Tensor, pos: torch.Tensor, *, n: int, recent: int = 0, sinks: int = 0) -> torch.Tensor:
    """Which ``n`` entries to keep: the first ``sinks`` and last ``recent`` positions, then the largest scores, ties to
    the smaller position. Logical indices ``[b, heads, n]``, ascending; -1 where there are fewer entries."""
    there = pos >= 0
    count = int(there.sum(-1).max()) if there.numel() else 0
    index = torch.arange(pos.shape[-1])
    kept = there
    if count > n:
        newest = pos.amax(-1, keepdim=True)
        protect = (pos < sinks) | (pos > newest - recent)
        rank = torch.where(there, torch.where(protect, torch.inf, score.double()), -torch.inf)
        least = rank.topk(n, -1).values[..., -1:]
        above, level = rank > least, there & (rank == least)
        room = n - above.sum(-1, keepdim=True)
        if bool((level.sum(-1, keepdim=True) > room).any()):
            place = torch.where(level, pos, torch.iinfo(torch.int64).max).argsort(-1).argsort(-1)
            level &= place < room
        kept = above | level
    end = len(index)
    best = torch.where(kept, index, end).sort(-1).values[..., :n]
    best = torch.where(best == end, -1, best)
    return torch.nn.functional.pad(best, (0, n - best.shape[-1]), value=-1)
