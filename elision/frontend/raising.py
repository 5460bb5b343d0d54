"""From a captured graph to a program: one template per class of blocks, an entry ``score`` that calls them along the stream."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from elision.errors import UnsupportedModel
from elision.frontend.anchors import AnchorFinder
from elision.frontend.capture import Captured
from elision.frontend.check import check_program, check_template
from elision.frontend.classify import classify_mask
from elision.frontend.lower import Lowering
from elision.frontend.normalise import normalise
from elision.frontend.structure import Segment, Structure, find_structure, is_attention
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layouts
from elision.ir.fuse import fuse_maps
from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.types import NAMES, Axis
from elision.ir.types import Tensor as TensorType
from elision.ir.value import Builder, Env, Graph, Value

log = logging.getLogger("elision")


@dataclass
class Raised:
    """A raised model: its program (one entry, ``score``), weights by name, and what was left opaque, per part."""

    program: Program
    weights: dict[str, Tensor]
    opaque: dict[str, list[str]] = field(default_factory=dict)


def raise_model(captured: Captured, name: str, *, positions: int) -> Raised:
    """Raise a captured model whose longest sequence is ``positions``.

    Every template is checked against the sub-graph that it stands for, and the whole against the captured model. Raises
    UnsupportedModel when it has no attention or something in it cannot be said.
    """
    graph = normalise(captured.graph)
    captured = Captured(graph, captured.params, captured.source, captured.kinds, captured.inputs, captured.outputs)
    taint = Taint(graph, captured.kinds)
    structure = find_structure(graph, taint)
    if not any(is_attention(n) for s in structure.segments for n in s.nodes):
        raise UnsupportedModel(f"{name} has no attention: expected a transformer")
    log.info("structure: %d layers, %d blocks, %d templates", structure.layers, len(structure.segments), structure.templates)
    return _Raiser(captured, taint, structure, name, positions).run()


class _Raiser:
    def __init__(self, captured: Captured, taint: Taint, structure: Structure, name: str, positions: int) -> None:
        self.captured, self.taint, self.structure = captured, taint, structure
        self.layouts = Layouts(captured.graph, captured.inputs)
        self.anchors = AnchorFinder(captured, taint, self.layouts, positions)
        self.positions = positions
        self.raised = Raised(Program(name), {})
        self.masks: dict[fx.Node | None, Mask] = {}

    def run(self) -> Raised:
        program = self.raised.program
        calls: list[tuple[Segment, str, tuple[str, ...], Mask | None]] = []
        names: dict[int, str] = {}
        frequencies: dict[int, tuple[str, ...]] = {}
        for segment in self.structure.segments:
            number = segment.template
            if number not in names:
                names[number] = _unique(segment.kind, program.templates)
                template, extra = self._template(names[number], segment)
                program.templates[names[number]] = template
                frequencies[number] = extra
            calls.append((segment, names[number], frequencies[number], self._mask_of(segment)))
        program.entries["score"] = self._score(calls)
        log.info("templates verified against the captured blocks in float64")
        self._describe(program)
        check_program(program, self.raised.weights, self.captured)
        return self.raised

    # --- templates ---

    def _template(self, name: str, segment: Segment) -> tuple[Graph, tuple[str, ...]]:
        """The template of a segment: operands are the stream, the weights, then the rotation frequencies."""
        b = Builder(name)
        stream = b.input("h", self._token_type(segment.start, Axis("t")))
        weights = {p: b.input(_short(self.captured.source[p.name]), self._type_of(p)) for p in segment.params}
        extra: list[str] = []
        formals: dict[str, Value] = {}

        def frequencies(values: Tensor) -> Value:
            key = self._frequencies(values)
            if key not in formals:
                extra.append(key)
                formals[key] = b.input("inv_freq", self.raised.program.params[key])
            return formals[key]

        low = Lowering(b, self.layouts, lambda n: self._weight(n, weights), lambda n: Env("mask"))
        low.give(segment.start, stream)
        low.run(segment.nodes, self.anchors.find(segment.nodes, segment.start), frequencies)
        graph = fuse_maps(b.build(b.named(low.value(segment.end), "h")))
        if low.opaque:
            self.raised.opaque[name] = low.opaque
        check_template(graph, segment, self.captured, self.layouts, [self.raised.weights[k] for k in extra], self._mask_of(segment))
        return graph, tuple(extra)

    def _weight(self, node: fx.Node, weights: dict[fx.Node, Value]) -> Value:
        if node not in weights:
            raise UnsupportedModel(f"a block reads {node.format_node()}, which is neither a weight, the stream, a mask nor a rotation")
        return weights[node]

    def _mask_of(self, segment: Segment) -> Mask | None:
        """The mask class of a segment's attention, by evaluation; None without attention."""
        found: set[Mask] = set()
        for node in segment.nodes:
            if is_attention(node):
                found.add(self._mask(node))
        if len(found) > 1:
            raise UnsupportedModel(f"the attention sites of one block have different masks: {', '.join(map(str, found))}")
        return next(iter(found), None)

    def _mask(self, node: fx.Node) -> Mask:
        args: tuple[Any, ...] = node.args
        mask, window, causal = args[3], args[7], args[8]
        if mask is None:
            return Mask("window", window) if window else Mask("causal" if causal else "full")
        assert isinstance(mask, fx.Node)
        if mask not in self.masks:
            found = classify_mask(self.captured, mask, limit=self.positions)
            if found is None:
                raise UnsupportedModel("an attention mask is neither full, causal, a window nor chunks; a mask is never dropped")
            self.masks[mask] = Mask(found.kind, found.size)
        return self.masks[mask]

    def _frequencies(self, values: Tensor) -> str:
        """The parameter that holds these rotation frequencies, made if there is none."""
        values = values.detach().clone().contiguous()
        for name, tensor in self.raised.weights.items():
            if name.startswith("rope.") and tensor.dtype == values.dtype and torch.equal(tensor, values):
                return name
        name = f"rope.inv_freq{sum(n.startswith('rope.') for n in self.raised.weights) or ''}"
        self._store(name, values)
        return name

    # --- the entry ---

    def _score(self, calls: list[tuple[Segment, str, tuple[str, ...], Mask | None]]) -> Graph:
        program = self.raised.program
        b = Builder("score", program.templates)
        axis = Axis("t")
        ids = b.input("ids", TensorType((axis,), "i64"))
        prologue = self._between(None, self.structure.root)
        low = Lowering(b, self.layouts, lambda n: self._param(b, n), _no_mask)
        tokens = next(n for n in self.captured.graph.nodes if n.op == "placeholder" and self.captured.kinds.get(n.name) == "token")
        low.give(tokens, ids)
        low.run(prologue, self.anchors.find(prologue, None), _no_frequencies)
        h = low.value(self.structure.root)
        for segment, template, extra, mask in calls:
            weights = [self._param(b, p) for p in segment.params]
            shared = [b.param(k, program.params[k]) for k in extra]
            env = {"env": (("mask", mask),)} if mask is not None else {}
            part = {"both": "block", "other": "block"}.get(segment.kind, segment.kind)
            label = f"{segment.layer}.{part}" if segment.layer is not None else part
            h = b.add("call", h, *weights, *shared, target=template, label=label, name="h", **env)
        epilogue = self._between(self.structure.stream[-1], self.structure.result)
        low.give(self.structure.stream[-1], h)
        low.run(epilogue, self.anchors.find(epilogue, self.structure.stream[-1]), _no_frequencies)
        if low.opaque:
            self.raised.opaque["score"] = low.opaque
        return b.build(b.named(low.value(self.structure.result), "logits"))

    def _between(self, start: fx.Node | None, end: fx.Node) -> tuple[fx.Node, ...]:
        """Token nodes that ``end`` needs, after ``start``."""
        needed: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node is start or node in needed or not self.taint.token(node) or node.op == "placeholder":
                continue
            needed.add(node)
            stack.extend(node.all_input_nodes)
        return tuple(sorted(needed))

    # --- weights ---

    def _param(self, b: Builder, node: fx.Node) -> Value:
        if node.name not in self.captured.source:
            raise UnsupportedModel(f"the model reads {node.format_node()}, which is neither a weight nor a token value")
        name = self.captured.source[node.name]
        self._store(name, self.captured.params[name])
        return b.param(name, self.raised.program.params[name])

    def _store(self, name: str, tensor: Tensor) -> None:
        self.raised.weights[name] = tensor
        self.raised.program.params[name] = TensorType(tuple(tensor.shape), NAMES[tensor.dtype])

    def _type_of(self, node: fx.Node) -> TensorType:
        value = node.meta["val"]
        return TensorType(tuple(value.shape), NAMES[value.dtype])

    def _token_type(self, node: fx.Node, axis: Axis) -> TensorType:
        layout = self.layouts.of(node)
        if layout is None:
            raise UnsupportedModel("the stream has not exactly one batch and one length axis")
        return TensorType((axis, *layout.features), NAMES[node.meta["val"].dtype])

    def _describe(self, program: Program) -> None:
        """Facts of the model that the runtime and the passes ask for."""
        score = program.entries["score"]
        logits, h = score.outputs[0].tensor, score.calls()[0].args[0].tensor
        program.meta = {
            "outputs": ("logits",),
            "vocab": logits.width,
            "hidden": h.width,
            "dtype": h.dtype,
            "positions": self.positions,
            "causal": all(m.kind != "full" for s in self.structure.segments if (m := self._mask_of(s)) is not None),
        }


def _unique(kind: str, taken: dict[str, Any]) -> str:
    base = {"both": "block", "other": "block"}.get(kind, kind)
    return base if base not in taken else next(n for i in range(1, 10_000) if (n := f"{base}_{i}") not in taken)


def _short(name: str) -> str:
    """A readable operand name from a weight's: its last module."""
    parts = [p for p in name.split(".") if p not in ("weight",)]
    return parts[-2] + "_bias" if parts[-1] == "bias" and len(parts) > 1 else parts[-1]


def _no_mask(node: fx.Node) -> Any:
    raise UnsupportedModel("attention outside the blocks of the stream")


def _no_frequencies(values: Tensor) -> Value:
    raise UnsupportedModel("a rotation outside the blocks of the stream")


Frequencies = Callable[[Tensor], Value]
