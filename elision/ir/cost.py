"""The cost model: FLOPs and bytes by operand, for every op that one call of an entry runs.

Bytes count each operand once per op that reads it, as a kernel per op would move them. What no fusion can avoid is the weights
and the states: `floor` is the time that a machine needs for those, or for the arithmetic, whichever is longer (the roofline of
Williams, Waterman and Patterson, 2009).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from elision.errors import BadInput
from elision.ir.op import Cost, Sizes, lookup
from elision.ir.program import Program
from elision.ir.states import Array
from elision.ir.types import Tensor
from elision.ir.value import Types
from elision.ir.walk import CONTROL, Site, sites


@dataclass(frozen=True)
class Row:
    """One op of one call. ``label`` is its block (``0.attn``); bytes are those read of weights, of states and of activations, and
    those written."""

    op: str
    label: str
    flops: float = 0.0
    weight_bytes: float = 0.0
    state_bytes: float = 0.0
    activation_bytes: float = 0.0
    write_bytes: float = 0.0

    @property
    def bytes(self) -> float:
        """All bytes moved by a kernel for just this op."""
        return self.weight_bytes + self.state_bytes + self.activation_bytes + self.write_bytes


def cost(program: Program, entry: str, sizes: Sizes) -> list[Row]:
    """What one call of an entry (or of the round or a tick) costs, op by op in order. Raises BadInput for an unknown name.

    ``sizes.tokens``: tokens of the call over all rows; ``sizes.context``: entries that each attends to, itself included. An axis
    whose size is not given by name has one token per row if `first`, `last` or `root` makes it, else ``sizes.tokens``. A `when`
    counts as taken; the FLOPs of an opaque operator are an estimate (`elision.ir.ops.aten`).
    """
    graphs = program.graphs()
    if entry not in graphs:
        raise BadInput(f"cost: there is no entry {entry!r}; there are {', '.join(graphs)}")
    found = list(sites(program, graphs[entry]))
    known = dict(sizes.axes)
    for site in found:
        made = site.actual(site.value)
        if site.value.op in ("first", "last", "root") and isinstance(made, Tensor) and made.tokens is not None:
            known.setdefault(made.tokens.name, sizes.rows)
    sizes = replace(sizes, axes=known)
    return [_row(site, sizes) for site in found if site.value.op not in CONTROL]


def total(rows: Iterable[Row]) -> Row:
    """The sum of the rows."""
    rows = list(rows)
    sums = (sum(getattr(r, f) for r in rows) for f in _SUMMED)
    return Row("total", "", *sums)


def floor(total: Row, bandwidth: float, flops: float) -> float:
    """Seconds that the call takes at least, on a machine that moves ``bandwidth`` bytes and does ``flops`` operations a second.

    Only weights and states must come from memory: activations may stay in caches or registers.
    """
    return max((total.weight_bytes + total.state_bytes) / bandwidth, total.flops / flops)


@dataclass(frozen=True)
class StepCost:
    """What a decode step costs, in any unit, by how many layers it runs: ``rest`` in any case (embedding, head, what the host
    does), and for each layer ``layer`` and, for every entry of the cache that it attends to, ``entry``."""

    rest: float
    layer: float
    entry: float = 0.0

    def __call__(self, layers: float, context: float = 0.0) -> float:
        return self.rest + layers * (self.layer + self.entry * context)


_SUMMED = ("flops", "weight_bytes", "state_bytes", "activation_bytes", "write_bytes")


def _row(site: Site, sizes: Sizes) -> Row:
    types, result = site.types(), site.actual(site.value)
    rule = lookup(site.value.op).cost
    attrs = {name: site.attr(name) for name, _ in site.value.attrs}
    found = rule(sizes, types, result, attrs) if rule is not None else _default(sizes, types, result)
    read = {"weight": 0.0, "state": 0.0, "activation": 0.0}
    for index, moved in found.read.items():
        operand = site.value.args[index]
        param = not operand.is_state and site.frame.source(operand)[1].op == "param"
        read["state" if operand.is_state else "weight" if param else "activation"] += moved
    times = site.frame.times
    moved_bytes = (read["weight"], read["state"], read["activation"], found.write)
    return Row(site.value.op, site.frame.label, found.flops * times, *(b * times for b in moved_bytes))


def _default(sizes: Sizes, types: list[Types], result: Types) -> Cost:
    """Every operand read once, the result written once, no arithmetic; a cache counts only where an op's own rule says how."""
    results = result if isinstance(result, tuple) else (result,)
    return Cost(0.0, {i: _bytes(sizes, t) for i, t in enumerate(types)}, sum(_bytes(sizes, t) for t in results))


def _bytes(sizes: Sizes, type: Types) -> float:
    if isinstance(type, Tensor):
        return float(sizes.bytes(type))
    return float(sizes.state_bytes(type)) if isinstance(type, Array) else 0.0
