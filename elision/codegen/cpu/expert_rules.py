"""The rows of a mixture of experts: `route`, and `experts` as a list of pairs and two products."""

from __future__ import annotations

from elision.codegen.cpu import experts as made
from elision.codegen.cpu import expression
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.route import Route
from elision.codegen.cpu.route import route as make_route
from elision.codegen.planner import Planner, Ref
from elision.codegen.refusal import NotNative
from elision.ir.expr import operands
from elision.ir.packing import PANEL, panels
from elision.ir.value import Value


def route(kernels: Kernels, plan: Planner, value: Value) -> None:
    """Gates and indices of the experts of every token."""
    x = value.args[0]
    source = plan.ref(x)
    if x.tensor.dtype != "f32" or not source.contiguous or len(source.shape) != 1:
        raise NotNative(f"router logits {x.tensor}")
    parts = {v.attr("index"): v for v in plan.graph.values if v.op == "item" and v.args[0] is value}
    if len(parts) != 2:
        raise NotNative("a part of the routing that nothing reads")
    site = Route(source.shape[0], biased=len(value.args) > 1, **dict(value.attrs))
    weight, index = plan.new(parts[0]), plan.new(parts[1])
    scratch = plan.buffer(-1, site.scratch_bytes, private=True)
    name = kernels.add(("route", site), lambda n: make_route(n, site))
    plan.row(
        name, ("axis", plan.axis(x)), plan.tensor(source), plan.tensor(weight), plan.tensor(index, 8),
        ("tensor", scratch, 0, 4), *(plan.packing(b, "plain") for b in value.args[1:]), ("int", plan.share),
        writes=[weight.buffer, index.buffer, scratch],
    )  # fmt: skip


def experts(kernels: Kernels, plan: Planner, value: Value) -> None:
    """The two products of every expert over its tokens."""
    x, weight, index, up, down, *biases = value.args
    count, wide, width = up.tensor.sizes
    out = value.tensor.width
    parts, halves = operands(value.attr("expr")), value.attr("halves", True)
    if not all(w.tensor.dtype == "f32" and w.tensor.encoding is None for w in (x, up, down, *biases)):
        raise NotNative("weights of experts that are not float32")
    if not expression.supported(value.attr("expr")):
        raise NotNative(f"no vector code for {value.attr('expr')}")
    if wide // parts % PANEL or (not halves and parts > 2) or (biases and out % PANEL):
        raise NotNative(f"experts of {wide} and {out} channels, not whole panels")
    refs = [plan.ref(a) for a in (x, weight, index)]
    if not all(r.contiguous for r in refs):
        raise NotNative("an operand of experts with gaps")
    k = refs[1].shape[-1]
    site = made.Experts(
        count, k, width, wide // parts, out, value.attr("expr"), parts, halves or parts == 1, value.attr("weighted", "output"),
        bool(biases),
    )  # fmt: skip
    axis = plan.axis(value)
    order, starts = plan.buffer(axis, k * 8, private=True), plan.buffer(-1, (count + 2) * 8, private=True)
    name = kernels.add(("dispatch", count, k), lambda n: made.dispatch(n, count, k))
    listed = [("tensor", order, 0, 8), ("tensor", starts, 0, 8)]
    plan.row(name, ("axis", axis), plan.tensor(refs[2], 8), *listed, writes=[order, starts])
    packed = [plan.packing(up, "panel:f32"), plan.packing(down, "panel:f32")]
    more = [[plan.packing(b, "plain")] for b in biases] or [[], []]
    h = Ref(plan.buffer(axis, k * site.inner * 4, private=False), 0, (1,), (k * site.inner,))
    result = Ref(plan.buffer(axis, panels(out) * PANEL * 4, private=False), 0, (1,), (out,))
    source, gates = plan.tensor(refs[0]), plan.tensor(refs[1])
    name = kernels.add(("experts_up", site), lambda n: made.up(n, site))
    plan.row(name, ("axis", axis), source, gates, *listed, plan.tensor(h), packed[0], *more[0], writes=[h.buffer])
    name = kernels.add(("experts_down", site), lambda n: made.down(n, site))
    target = plan.tensor(result)
    plan.row(name, ("axis", axis), plan.tensor(h), gates, *listed, target, packed[1], *more[1], writes=[result.buffer])
    plan.refs[value] = result
