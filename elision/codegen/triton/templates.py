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
    linear,
    moe,
    move,
    noise,
    pages,
    rope,
    rows,
    sample,
    scores,
)
from elision.codegen.triton.expression import expression
from elision.ir.launch import Kernel

TEMPLATES: dict[str, Any] = {
    "gemv": linear.gemv,
    "gemm": linear.gemm,
    "norm": rows.norm,
    "embed": rows.embed,
    "restrict": rows.restrict,
    "pointwise": rows.pointwise,
    "rope": rope.rope,
    "append": append.append,
    "advance": append.advance,
    "attend": attend.attend,
    "combine": combine.combine,
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
