"""Ops that cost nothing: another view of what is in memory. Raise NotNative where there is no such view."""

from __future__ import annotations

from elision.codegen.planner import Planner, Ref, contiguous
from elision.codegen.refusal import need
from elision.ir.value import Value


def view(plan: Planner, value: Value) -> None:
    """The features of every token in another shape."""
    ref, shape = plan.ref(value.args[0]), tuple(value.attr("shape"))
    if ref.contiguous:
        plan.refs[value] = Ref(ref.buffer, ref.offset, contiguous(shape), shape)
        return
    head = ref.shape[: len(ref.shape) - 1]
    need(len(shape) > len(head) and shape[: len(head)] == head, "a view across a gap")
    rest = shape[len(head) :]
    need(ref.strides[-1] == 1, "a view of channels that are not side by side")
    plan.refs[value] = Ref(ref.buffer, ref.offset, (*ref.strides[:-1], *contiguous(rest)), shape)


def slice_(plan: Planner, value: Value) -> None:
    """Some channels."""
    ref, axis, start = plan.ref(value.args[0]), value.attr("axis", -1), value.attr("start")
    shape = list(ref.shape)
    shape[axis] = value.attr("stop") - start
    plan.refs[value] = Ref(ref.buffer, ref.offset + start * ref.strides[axis], ref.strides, tuple(shape))
