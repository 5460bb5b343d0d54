"""The rows of a mixture of experts: `route`, and `experts` as a list of pairs and two products."""

from __future__ import annotations

from elision.codegen.cpu import experts as made
from elision.codegen.cpu import expression
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.route import Route
from elision.codegen.cpu.route import route as make_route
from elision.codegen.planner import Planner, Ref
from elision.codegen.refusal import floats, need
from elision.ir.expr import operands
from elision.ir.packing import PANEL, packing_of, panels
from elision.ir.value import Value


def route(kernels: Kernels, plan: Planner, value: Value) -> None:
    """Gates and indices of the experts of every token."""
    x = value.args[0]
    source = plan.ref(x)
    need(x.tensor.dtype == "f32" and source.contiguous and len(source.shape) == 1, f"router logits {x.tensor}")
    parts = {v.attr("index"): v for v in plan.graph.values if v.op == "item" and v.args[0] is value}
    need(len(parts) == 2, "a part of the routing that nothing reads")
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
    floats(x, *biases)
    need(up.tensor.dtype == down.tensor.dtype == "f32", "weights of experts that are not float32")
    need(expression.supported(value.attr("expr")), f"no vector code for {value.attr('expr')}")
    whole = wide // parts % PANEL == 0 and (halves or parts <= 2) and not (biases and out % PANEL)
    need(whole, f"experts of {wide} and {out} channels, not whole panels")
    packings = [packing_of(w.tensor.encoding, w.tensor.row) for w in (up, down)]
    need(None not in packings, f"experts with rows of {up.tensor.row} and {down.tensor.row} weights in {up.tensor.encoding}")
    packed = [plan.packing(w, str(packing)) for w, packing in zip((up, down), packings, strict=True)]
    refs = [plan.ref(a) for a in (x, weight, index)]
    need(all(r.contiguous for r in refs), "an operand of experts with gaps")
    k = refs[1].shape[-1]
    site = made.Experts(
        count, k, width, wide // parts, out, value.attr("expr"), parts, halves or parts == 1, value.attr("weighted", "output"),
        bool(biases), (str(packings[0]).partition(":")[2], str(packings[1]).partition(":")[2]),
    )  # fmt: skip
    axis = plan.axis(value)
    order, starts = plan.buffer(axis, k * 8, private=True), plan.buffer(-1, (count + 2) * 8, private=True)
    name = kernels.add(("dispatch", count, k), lambda n: made.dispatch(n, count, k))
    listed = [("tensor", order, 0, 8), ("tensor", starts, 0, 8)]
    plan.row(name, ("axis", axis), plan.tensor(refs[2], 8), *listed, writes=[order, starts])
    more = [[plan.packing(b, "plain")] for b in biases] or [[], []]
    h = Ref(plan.buffer(axis, k * site.inner * 4, private=False), 0, (1,), (k * site.inner,))
    result = Ref(plan.buffer(axis, panels(out) * PANEL * 4, private=False), 0, (1,), (out,))
    source, gates = plan.tensor(refs[0]), plan.tensor(refs[1])
    name = kernels.add(("experts_up", site), lambda n: made.up(n, site))
    own = _memory(plan, axis, site.inputs_up)
    places = [("tensor", buffer, 0, 4) for buffer in own]
    row = [source, gates, *listed, plan.tensor(h), packed[0], *more[0], *places]
    plan.row(name, ("axis", axis), *row, writes=[h.buffer, *own])
    name = kernels.add(("experts_down", site), lambda n: made.down(n, site))
    target = plan.tensor(result)
    own = _memory(plan, axis, site.inputs_down)
    places = [("tensor", buffer, 0, 4) for buffer in own]
    row = [plan.tensor(h), gates, *listed, target, packed[1], *more[1], *places]
    plan.row(name, ("axis", axis), *row, writes=[result.buffer, *own])
    plan.refs[value] = result


def _memory(plan: Planner, axis: int, bytes: tuple[int, int] | None) -> list[int]:
    """Every thread's buffers for sums of inputs, of each token, and for decoded panels; none for plain weights."""
    return [] if bytes is None else [plan.buffer(axis, bytes[0], private=True), plan.buffer(-1, bytes[1], private=True)]
