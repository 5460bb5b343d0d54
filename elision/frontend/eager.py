"""Attention that a model writes out becomes one ``elision::attention``: products, softmax and all that is between them.

A cluster is read off the data flow around a softmax: up to the product of queries and keys, down to the product with the
values. Its scale and soft cap are the numbers on the way; its mask and ALiBi are the logits of scores that are all zero, kept
as a value of the graph. The proposal is accepted if it gives the cluster's own result in float64, whatever the queries, keys
and values; otherwise the cluster stays as it is.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import Tensor, fx

from elision.frontend.anchors import close
from elision.frontend.attention import ATTENTION
from elision.frontend.capture import Captured
from elision.frontend.evaluate import evaluate
from elision.frontend.logits import MOVES, PRODUCTS, LogitReader, Logits
from elision.frontend.normalise import operator_name
from elision.frontend.structure import attends, is_attention
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layout, Layouts, check_tokens
from elision.frontend.trace import Tracer

# Rows and length of the random checks; the first position is not 0.
_CHECKS = ((2, 5), (3, 9))


def fuse_attention(captured: Captured) -> bool:
    """Replace every written-out attention of the normalised graph, in place; True if there was one."""
    taint = Taint(captured.graph, captured.kinds)
    softmaxes = [n for n in captured.graph.nodes if attends(n) and not is_attention(n) and taint.token(n)]
    if not softmaxes:
        return False
    fuser = _Fuser(captured, taint)
    found = [fuser.fuse(node) for node in softmaxes]
    captured.graph.eliminate_dead_code()  # what was written out, and proposals that did not fit
    return any(found)


@dataclass(frozen=True)
class _Operand:
    """A value of the token layout of which an operand of a product is ``factor`` times a rearrangement."""

    node: fx.Node
    layout: Layout
    factor: float


class _Fuser:
    def __init__(self, captured: Captured, taint: Taint) -> None:
        self._captured, self._taint = captured, taint
        self._layouts = Layouts(captured.graph, captured.inputs)
        self._reader = LogitReader(captured, taint)
        self._trace = Tracer(captured.graph, captured.inputs)

    def fuse(self, softmax: fx.Node) -> bool:
        out, logits = self._below(softmax), self._reader.read(softmax)
        end = self._end(out) if out is not None else None
        products = [self._reader.factors(n) for n in (logits.scores, out)] if logits is not None and out is not None else []
        if logits is None or end is None or len(products) != 2 or products[0] is None or products[1] is None:
            return False
        (first, second), (left, right) = products[0], products[1]
        values = right if self._moved(left, softmax) else left
        with self._captured.graph.inserting_before(end):
            bias = self._reader.bias(logits, softmax, self._trace, self._layouts)
            for queries, keys in ((first, second), (second, first)):
                for q, k, v in itertools.product(*map(self._sources, (queries, keys, values))):
                    found = self._propose(q, k, v, bias, logits, end)
                    if found is not None and self._agree(end, found, (q, k, v)):
                        end.replace_all_uses_with(found)
                        return True
        return False

    # --- the cluster ---

    def _below(self, softmax: fx.Node) -> fx.Node | None:
        """The product of the probabilities with the values."""
        node = softmax
        while len(node.users) == 1:
            node = next(iter(node.users))
            if operator_name(node) in PRODUCTS:
                return node
            # A mask that is applied here would not be seen by the classification, so only moves may follow.
            if operator_name(node) not in MOVES | {"aten::slice"}:
                return None
        return None

    def _end(self, out: fx.Node) -> fx.Node | None:
        """The first value from the product on that has the token layout."""
        while self._layouts.of(out) is None:
            if len(out.users) != 1:
                return None
            out = next(iter(out.users))
            if operator_name(out) not in MOVES:
                return None
        return out

    def _moved(self, node: fx.Node, on: fx.Node) -> bool:
        """A value that is ``on``, moved."""
        while node is not on and operator_name(node) in MOVES | {"aten::slice"}:
            node = node.args[0]  # type: ignore[assignment]
        return node is on

    def _sources(self, operand: fx.Node) -> list[_Operand]:
        """What an operand may be a rearrangement of, the farthest first: before keys are repeated for their query heads."""
        width = {n for n in operand.meta["val"].shape if isinstance(n, int)}
        found: list[_Operand] = []
        node, factor = operand, 1.0
        while True:
            layout = self._layouts.of(node)
            if layout is not None and layout.features and layout.features[-1] in width:
                found.append(_Operand(node, layout, factor))
            scaled = self._reader.scaled(node)
            if scaled is not None:
                node, factor = scaled[0], factor * scaled[1]
            elif operator_name(node) in MOVES and isinstance(node.args[0], fx.Node):
                node = node.args[0]
            else:
                return found[::-1]

    # --- the proposal ---

    def _propose(
        self, q: _Operand, k: _Operand, v: _Operand, bias: fx.Node | None, logits: Logits, end: fx.Node
    ) -> fx.Node | None:
        if q.layout.features[-1] != k.layout.features[-1] or v.factor != 1.0:
            return None
        scale = logits.scale * q.factor * k.factor
        heads = [self._heads(x) for x in (q, k, v)]
        counts = [n.meta["val"].shape[1] for n in heads]
        layout = self._layouts.of(end)
        assert layout is not None
        width = v.layout.features[-1]
        if counts[0] % counts[1] or counts[1] != counts[2] or counts[0] * width != math.prod(layout.features):
            return None
        found = self._trace(ATTENTION, *heads, bias, logits.sinks, scale, logits.softcap, 0, False)
        shape = [self._trace.batch, self._trace.length, *layout.features]
        found = self._trace.reshape(found, shape)
        if layout.merged:
            found = self._trace.reshape(found, [-1, *layout.features])
        else:
            order = list(range(2, layout.rank))
            for dim, axis in sorted(((layout.batch, 0), (layout.length, 1))):
                order.insert(dim, axis)
            found = self._trace.permute(found, order)
        return self._trace.cast(found, end.meta["val"].dtype)

    def _heads(self, x: _Operand) -> fx.Node:
        """``[B, H, T, D]`` of a value with the token layout; all features but the last are heads."""
        layout, node = x.layout, x.node
        if not layout.merged:
            others = [d for d in range(layout.rank) if d not in (layout.batch, layout.length)]
            if len(layout.features) == 2:
                return self._trace.permute(node, [layout.batch, others[0], layout.length, others[1]])
            node = self._trace.permute(node, [layout.batch, layout.length, *others])
        node = self._trace.reshape(node, [self._trace.batch, self._trace.length, -1, layout.features[-1]])
        return self._trace.permute(node, [0, 2, 1, 3])

    def _agree(self, end: fx.Node, found: fx.Node, operands: tuple[_Operand, ...]) -> bool:
        """The proposal gives what the cluster gives, in float64, on random operands."""
        for rows, length in _CHECKS:
            positions, _ = check_tokens(rows, length, first=3)
            given: dict[fx.Node, Tensor] = {}
            for seed, x in enumerate(operands):
                given.setdefault(x.node, x.layout.random(rows, length, seed))
            try:
                a, b = evaluate(self._captured, [end, found], positions, given=given, wide=True)
            except RuntimeError:  # shapes that do not fit: not this way round
                return False
            if not close(b, a):
                return False
        return True
