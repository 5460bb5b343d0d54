"""The rows of ops that move tokens from one axis to another."""

from __future__ import annotations

from math import prod

from elision.codegen.cpu import rows
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.planner import Planner
from elision.codegen.refusal import floats, need
from elision.codegen.regions import OF_TOKENS
from elision.ir.value import Value


def restrict(kernels: Kernels, plan: Planner, value: Value) -> None:
    source = plan.ref(value.args[0])
    need(source.contiguous, "an operand with gaps")
    out, width = plan.new(value), prod(source.shape)
    name = kernels.add(("gather", width), lambda n: rows.gather(n, width))
    plan.row(name, ("axis", plan.axis(value)), plan.tensor(source), plan.tensor(out), ("int", plan.share), writes=[out.buffer])


def gather(kernels: Kernels, plan: Planner, value: Value) -> None:
    source, index = (plan.ref(a) for a in value.args)
    need(source.contiguous and value.args[0].tensor.tokens is not None, "rows with gaps, or of a weight")
    out, width = plan.new(value), prod(source.shape)
    name = kernels.add(("take", width), lambda n: rows.take(n, width))
    operands = [plan.tensor(source), plan.tensor(index, 8), plan.tensor(out), ("int", plan.share)]
    plan.row(name, ("axis", plan.axis(value)), *operands, writes=[out.buffer])


def prepend(kernels: Kernels, plan: Planner, value: Value) -> None:
    x, first, index = value.args
    source = plan.ref(x)
    need(source.contiguous and index.op in OF_TOKENS, "places that depend on data")
    floats(first)
    out, width, count = plan.new(value), prod(source.shape), first.tensor.sizes[0]
    name = kernels.add(("prepend", width, count), lambda n: rows.prepend(n, width, count))
    operands = [plan.tensor(source), plan.packing(first, "plain"), plan.tensor(out), ("int", plan.share)]
    plan.row(name, ("axis", plan.axis(value)), *operands, writes=[out.buffer])
