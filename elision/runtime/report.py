"""What was compiled, in plain numbers: `Model.report`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elision.ir.cost import cost, total
from elision.ir.layout import nbytes
from elision.ir.op import Sizes
from elision.runtime.native.weights import PackedWeights

if TYPE_CHECKING:
    from elision.runtime.model import Model


def report(model: Model) -> dict[str, Any]:
    """Coverage, quality and passes; bytes of the weights, of the states of one row per token and at ``max_context``; the
    cost of one decoded token at half of ``max_context`` (FLOPs, and bytes of weights and states that it must read)."""
    program, most = model.program, model.max_context
    found: dict[str, Any] = {
        "name": program.name,
        "quality": program.quality,
        "passes": list(program.applied),
        "layers": sorted(program.layers),
        "coverage": model.coverage,
        "weight_bytes": weight_bytes(model),
        "max_context": most,
        "max_batch": model.max_batch,
        "state_bytes": sum(nbytes(t, 1, most) for t in program.states.values()),
        "state_bytes_per_token": sum(nbytes(t, 1, 1024) - nbytes(t, 1, 512) for t in program.states.values()) / 512,
    }
    if "step" in program.entries:
        row = total(cost(program, "step", Sizes(tokens=1, rows=1, context=most // 2)))
        found["step"] = {
            "context": most // 2,
            "flops": row.flops,
            "weight_bytes": row.weight_bytes,
            "state_bytes": row.state_bytes,
        }
    return found


def weight_bytes(model: Model) -> int:
    """Bytes of the weights in memory, those that several names share counted once."""
    stored = model.weights.stored if isinstance(model.weights, PackedWeights) else model.weights
    views = {(w.untyped_storage().data_ptr(), w.storage_offset(), w.numel()): w for w in stored.values()}
    return sum(w.numel() * w.element_size() for w in views.values())
