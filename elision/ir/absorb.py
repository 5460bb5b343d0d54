"""Entries of a cache that are evicted join one that stays: the merge of EMS (Li et al. 2024, "Adaptive Evict-then-Merge")."""

from __future__ import annotations

import torch

from elision.ir.store import KVStore


def absorb(
    store: KVStore,
    score: torch.Tensor,
    pos: torch.Tensor,
    kept: torch.Tensor,
    rows: torch.Tensor,
    n: int,
    least: float,
    near: int,
) -> None:
    """The ``n`` largest scores ``[R, H, C]`` among entries that are not ``kept [R, H, N]`` (logical indices, -1: none) are the
    candidates. Each joins the kept entry at most ``near`` positions away whose key is most like its own, if their cosine is
    at least ``least``; else it is lost. Key and value of who is joined become the means weighed by the scores, and its scores the
    sums; it keeps its position. Scores count as at least 1e-12."""
    end = pos.shape[-1]
    stays = torch.zeros(*pos.shape[:2], end + 1, dtype=torch.bool).scatter_(2, torch.where(kept >= 0, kept, end), True)[..., :end]
    free = (pos >= 0) & ~stays
    if not n or not bool(free.any()):
        return
    k, v = (store.entries(what, end, torch.float32)[rows] for what in "kv")
    weight = score.clamp(min=1e-12).float()
    best = torch.where(free, weight, -1).topk(min(n, end), -1).indices.sort(-1).values  # [R, H, n]; some may not be free
    unit = torch.nn.functional.normalize(k, dim=-1)
    like = unit.gather(2, _wide(best, k)) @ unit.transpose(2, 3)
    far = (pos.gather(2, best)[..., None] - pos[:, :, None]).abs() > near
    cosine, target = like.masked_fill(far | ~stays[:, :, None], -torch.inf).max(-1)
    joins = free.gather(2, best) & (cosine >= least) & (cosine > -torch.inf)
    if not bool(joins.any()):
        return
    r, h, i = joins.nonzero(as_tuple=True)
    source, to = best[r, h, i], target[r, h, i]
    line = (r * pos.shape[1] + h) * end
    whole = weight.flatten().clone().index_add_(0, line + to, weight[r, h, source])
    b, ends = rows[r], torch.unique(line + to)
    for what, x in (("k", k), ("v", v)):
        sums = (x * weight[..., None]).flatten(0, 2).index_add_(0, line + to, x[r, h, source] * weight[r, h, source, None])
        at, head, slot = rows[ends // (pos.shape[1] * end)], ends // end % pos.shape[1], ends % end
        found = (sums[ends] / whole[ends, None]).to(store.dtype)
        store.segments[0].write(what, at[:, None, None], head[:, None, None], slot[:, None, None], found[:, None, None])
    assert store.type.scores is not None
    for name in store.type.scores.arrays:
        array = store.index[name]
        array.index_put_((b, h, to), array[b, h, source], accumulate=True)


def _wide(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return index[..., None].expand(-1, -1, -1, like.shape[-1])
