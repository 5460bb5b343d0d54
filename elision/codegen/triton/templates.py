"""The kernels by name."""

from __future__ import annotations

from typing import Any

from elision.codegen.triton import (
    append,
    attend,
    choose,
    combine,
    credit,
    evict,
    flush,
    images,
    linear,
    looked,
    merge,
    moe,
    move,
    noise,
    own,
    pages,
    rank,
    rope,
    rows,
    sample,
    scores,
    select,
    similar,
)  # fmt: skip
from elision.codegen.triton.drafts import draft_lookup, draft_recycled, recycle, take
from elision.codegen.triton.expression import expression
from elision.codegen.triton.project import project
from elision.ir.launch import Kernel

TEMPLATES: dict[str, Any] = {
    "gemv": linear.gemv,
    "gemm": linear.gemm,
    "norm": rows.norm,
    "embed": rows.embed,
    "restrict": rows.restrict,
    "pointwise": rows.pointwise,
    "rope": rope.rope,
    "project": project,
    "append": append.append,
    "advance": append.advance,
    "attend": attend.attend,
    "combine": combine.combine,
    "attend_own": own.attend_own,
    "looks": looked.looks,
    "received": looked.received,
    "unit": similar.unit,
    "nearest": similar.nearest,
    "join_similar": select.join_similar,
    "join_rest": select.join_rest,
    "stays": select.stays,
    "uniform": rank.uniform,
    "settle": rank.settle,
    "importance": rank.importance,
    "halves": rank.halves,
    "remain": rank.remain,
    "stand": rank.stand,
    "compact": merge.compact,
    "joined": merge.joined,
    "merge": merge.merge,
    "concat": rows.concat,
    "patches": images.patches,
    "prepend": images.prepend,
    "key_scores": scores.key_scores,
    "mass": scores.mass,
    "credit": credit.credit,
    "noisy_keys": noise.noisy_keys,
    "noisy_kept": noise.noisy_kept,
    "noisy_waiting": noise.noisy_waiting,
    "summarise": pages.summarise,
    "summarised": pages.summarised,
    "bounds": pages.bounds,
    "pick": pages.pick,
    "evict": evict.evict,
    "move_scores": evict.move_scores,
    "move": move.move,
    "flush": flush.flush,
    "move_up": flush.move_up,
    "flushed": flush.flushed,
    "best_of_tile": choose.best_of_tile,
    "best_of_tiles": choose.best_of_tiles,
    "sample": sample.sample,
    "walk": choose.walk,
    "follow": choose.follow,
    "draft_lookup": draft_lookup,
    "draft_recycled": draft_recycled,
    "recycle": recycle,
    "take": take,
    "route": moe.route,
    "expert_gemv": moe.expert_gemv,
    "mixed": moe.mixed,
}


def constants(kernel: Kernel) -> dict[str, Any]:
    """A kernel's constants as its template takes them."""
    return {name: _constant(value) for name, value in kernel.constants.items()}


def _constant(value: Any) -> Any:
    if isinstance(value, dict):
        return expression(value["expression"], value["operands"])
    return value
