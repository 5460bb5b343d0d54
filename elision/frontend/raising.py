"""From a captured graph to a program: one template per class of blocks, an entry ``score`` that calls them along the stream."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from elision.errors import BadInput, UnsupportedModel
from elision.frontend.anchors import AnchorFinder, close
from elision.frontend.bias import Biases
from elision.frontend.capture import Captured
from elision.frontend.check import FAULT, check_program, check_template
from elision.frontend.dense_experts import DenseExpertFinder
from elision.frontend.eager import fuse_attention
from elision.frontend.experts import ExpertFinder
from elision.frontend.lower import Lowering, Region
from elision.frontend.names import short_name, unique_name
from elision.frontend.normalise import normalise, operator_name
from elision.frontend.operands import Frequencies, Operand, Operands, Slopes
from elision.frontend.padding import check_sources
from elision.frontend.patches import entry_inputs, find_patches, lower_patches
from elision.frontend.position_number import PositionNumbers
from elision.frontend.positions import offset_of, table_of
from elision.frontend.routers import RouterFinder
from elision.frontend.sites import AttentionSite, attention_site
from elision.frontend.streams import find_streams, told
from elision.frontend.structure import Segment, Structure, attends, between, find_structure, is_attention
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layouts
from elision.ir.fuse import fuse_maps
from elision.ir.mask import Mask
from elision.ir.program import Program, vocabulary
from elision.ir.types import Axis, parse_dtype
from elision.ir.types import Tensor as TensorType
from elision.ir.value import Builder, Env, Graph, Value

log = logging.getLogger("elision")


@dataclass
class Raised:
    """A raised model: its program (one entry, ``score``) and its weights by name."""

    program: Program
    weights: dict[str, Tensor]


def raise_model(captured: Captured, name: str, *, positions: int) -> Raised:
    """Raise a captured model whose longest sequence is ``positions``.

    Every template is checked against the sub-graph that it stands for, and the whole against the captured model. Raises
    UnsupportedModel when it has no attention or something in it cannot be said.
    """
    try:
        graph = normalise(captured.graph)
        captured = replace(captured, graph=graph)
        if fuse_attention(captured):
            graph = normalise(graph)
            captured = replace(captured, graph=graph)
        positions = min(positions, captured.longest)
        taint = Taint(graph, captured.kinds)
        structure = find_structure(graph, taint)
        _need_attention(graph, structure)
        log.info("structure: %d layers, %d blocks, %d templates", structure.layers, len(structure.segments), structure.templates)
        return _Raiser(captured, taint, structure, name, positions).run()
    except BadInput as err:
        streams = find_streams(graph, taint)
        if len(streams) > 1:
            raise UnsupportedModel(told(name, streams)) from err
        raise UnsupportedModel(f"{name} cannot be raised: {err}") from err
    except Exception as err:  # a model may hold anything; its user is told, whatever it is that we did not foresee
        reason = next(iter(str(err).strip().splitlines()), "")
        raise UnsupportedModel(f"{name} cannot be raised: {type(err).__name__}: {reason}. {FAULT}") from err


def _need_attention(graph: fx.Graph, structure: Structure) -> None:
    if any(is_attention(n) for s in structure.segments for n in s.nodes):
        return
    if any(attends(n) for n in graph.nodes):
        raise UnsupportedModel(
            "its attention is written out (a softmax over the tokens) in an unknown way; expected the softmax of products of "
            "queries and keys with a mask, torch's scaled_dot_product_attention or the attention functions of transformers"
        )
    raise UnsupportedModel("it has no attention; expected a transformer")


class _Raiser:
    def __init__(self, captured: Captured, taint: Taint, structure: Structure, name: str, positions: int) -> None:
        self.captured, self.taint, self.structure = captured, taint, structure
        self.layouts = Layouts(captured.graph, captured.inputs)
        self.anchors = AnchorFinder(captured, taint, self.layouts, positions)
        self.experts = ExpertFinder(captured, taint, self.layouts, close)
        self.dense_experts = DenseExpertFinder(captured, taint, self.layouts, close)
        self.routers = RouterFinder(captured, taint, self.layouts, close)
        self.numbers = PositionNumbers(captured, taint, positions)
        self.positions = min(positions, self.layouts.length(positions))
        self.raised = Raised(Program(name), {})
        self.biases = Biases(captured, self.positions, self.layouts.length(0))
        self.operands = Operands(captured, self.anchors, self.biases, self.raised.weights, self.raised.program.params)

    def run(self) -> Raised:
        program = self.raised.program
        built: dict[int, tuple[str, list[Operand]]] = {}
        self.numbers.check(self.structure.segments)
        for segment in self.structure.segments:
            if segment.template not in built:
                name = unique_name(segment.kind, program.templates)
                program.templates[name], operands = self._template(name, segment)
                built[segment.template] = (name, operands)
        log.info("templates verified against the captured blocks in float64")
        program.entries["score"] = self._score(built)
        self._describe(program)
        check_program(program, self.raised.weights, self.captured)
        return self.raised

    # --- templates ---

    def _template(self, name: str, segment: Segment) -> tuple[Graph, list[Operand]]:
        """The template of a segment: its operands are the stream and what `Operand` describes, in order of first use."""
        mask = self._mask_of(segment)
        b = Builder(name)
        stream = b.input("h", self._token_type(segment.start, Axis("t")))
        formals: dict[Operand, Value] = {}

        def formal(operand: Operand, hint: str) -> Value:
            if operand not in formals:
                taken = sum(self._formal_name(f) == hint for f in formals.values())
                param = self.operands.name(operand, segment)
                formals[operand] = b.input(f"{hint}_{taken}" if taken else hint, self.operands.type(param))
            return formals[operand]

        def outside(node: fx.Node, transposed: bool) -> Value:
            number = self.numbers.build(b, stream, node)
            if number is not None:
                return number
            operand = self.operands.describe(node, segment, transposed)
            return formal(operand, short_name(self.captured.source[self.operands.source(node).name]))

        def frequencies(cos: fx.Node, sin: fx.Node) -> Value:
            table = self.anchors.table(cos, sin)
            assert table is not None
            slots = (segment.externals.index(cos), segment.externals.index(sin))
            return formal(Frequencies(*slots, float(table.scale)), "inv_freq")

        def slopes(site: AttentionSite) -> Value | None:
            if site.mask is None or self.biases.of(site.mask).slopes is None:
                return None
            heads = site.q.meta["val"].shape[1]
            return formal(Slopes(segment.externals.index(site.mask), heads), "slopes")

        low = Lowering(b, self.layouts, outside, frequencies, lambda n: Env("mask"), slopes, self._constant)
        low.give(segment.start, stream)
        end = low.run(segment.nodes, self._regions(segment.nodes, segment.start), segment.end)
        graph = fuse_maps(b.build(b.named(end, "h")))
        weights = [self.operands.exact(o, segment) for o in formals]
        start = 0 if self.numbers.counted(segment) else 3

        def tables(positions: Tensor) -> dict[fx.Node, Tensor]:
            used = [(segment.externals[f.cos], segment.externals[f.sin]) for f in formals if isinstance(f, Frequencies)]
            return {n: t for pair in used for n, t in self.anchors.fitted(*pair, positions).items()}

        check_template(graph, segment, self.captured, self.layouts, weights, mask, start, tables)
        return graph, list(formals)

    def _constant(self, node: fx.Node) -> Tensor | None:
        """The value of a constant of the graph, None for anything else."""
        constant = node.op == "placeholder" and self.captured.kinds.get(node.name) == "const"
        return self.captured.params.get(self.captured.source.get(node.name, "")) if constant else None

    def _regions(self, nodes: tuple[fx.Node, ...], start: fx.Node | None) -> list[Region]:
        """What is one op each among the nodes of a block: norms, rotations, routers and experts."""
        experts = self.experts.experts(nodes)
        found = (self.routers.find(e.weight, e.index, set(nodes)) for e in experts)
        routers = [r for r in found if r is not None]
        return [*self.anchors.find(nodes, start), *experts, *routers, *self.dense_experts.find(nodes)]

    @staticmethod
    def _formal_name(value: Value) -> str:
        return str(value.attr("name")).rstrip("0123456789").rstrip("_")

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
        site = attention_site(node)
        mask = site.mask
        check_sources(self.captured, self.taint, mask)
        if mask is None:
            return Mask("window", site.window) if site.window else Mask("causal" if site.causal else "full")
        found = self.biases.of(mask).mask
        return Mask(found.kind, found.size)

    # --- the entry ---

    def _score(self, built: dict[int, tuple[str, list[Operand]]]) -> Graph:
        program = self.raised.program
        b = Builder("score", program.templates)
        prologue = between(self.taint, None, self.structure.root)
        patches = find_patches(self.captured, self.layouts, prologue)
        given = entry_inputs(b, self.captured, self.layouts, patches)
        tokens = next(iter(given.values()))

        def outside(node: fx.Node, transposed: bool) -> Value:
            if self.taint.param_only(node):
                source = self.operands.source(node)
                name = self.operands.weight(source, None if node is source else node, transposed)
                return b.param(name, program.params[name])
            return self._by_position(b, tokens, node)

        low = Lowering(b, self.layouts, outside, _no_rotation, _no_mask, _no_mask, self._constant)
        for node, value in given.items():
            low.give(node, value)
        if patches is not None:
            low.give(patches.end, lower_patches(b, patches, given[patches.pixels], self.captured, self.operands))
            prologue = between(self.taint, patches.end, self.structure.root)
        h = low.run(prologue, self._regions(prologue, None), self.structure.root)
        for segment in self.structure.segments:
            template, operands = built[segment.template]
            names = [self.operands.name(o, segment) for o in operands]
            weights = [b.param(n, program.params[n]) for n in names]
            mask = self._mask_of(segment)
            env = {"env": (("mask", mask),)} if mask is not None else {}
            part = {"both": "block", "other": "block"}.get(segment.kind, segment.kind)
            label = f"{segment.layer}.{part}" if segment.layer is not None else part
            h = b.add("call", h, *weights, target=template, label=label, name="h", **env)
        end = self.structure.stream[-1]
        low.give(end, h)
        outputs: list[Value] = []
        for name, result in zip(self.captured.outputs, self._results(), strict=True):
            epilogue = between(self.taint, end, result)
            found = low.run(epilogue, self._regions(epilogue, end), result)
            outputs.append(b.named(found, name.replace(".", "_")))
        return b.build(*outputs)

    def _results(self) -> list[fx.Node]:
        """The captured graph's outputs, in order."""
        output = next(n for n in self.captured.graph.nodes if n.op == "output")
        results = output.args[0]
        assert isinstance(results, list | tuple)
        return [n for n in results if isinstance(n, fx.Node)]

    def _by_position(self, b: Builder, ids: Value, node: fx.Node) -> Value:
        """Rows of a table at position + offset (GPT-2; OPT with offset 2); of another function of the position, its values."""
        table, index = (*node.args, None, None)[:2]
        learned = operator_name(node) == "aten::embedding" and isinstance(index, fx.Node) and self.taint.position_only(index)
        offset = offset_of(self.captured, index) if learned else None  # type: ignore[arg-type]
        if offset is not None:
            name = self.operands.weight(table)  # type: ignore[arg-type]
            self.positions = min(self.positions, int(self.raised.weights[name].shape[0]) - offset)
        else:
            rows = table_of(self.captured, node, self.positions) if self.taint.position_only(node) else None
            if rows is None:
                raise UnsupportedModel(f"the model reads {node.format_node()}, which is neither a weight nor one of positions")
            offset, name = 0, self.operands.shared("positions.table", rows)
        place = b.add("positions", ids, name="pos")
        if offset:
            place = b.add("map", place, expr=f"x0 + {offset}" if offset > 0 else f"x0 - {-offset}", name="pos")
        found = b.add("embed", place, b.param(name, self.raised.program.params[name]), name="positions")
        assert isinstance(found, Value)
        return found

    def _token_type(self, node: fx.Node, axis: Axis) -> TensorType:
        layout = self.layouts.of(node)
        if layout is None:
            raise UnsupportedModel("the stream has not exactly one batch and one length axis")
        return TensorType((axis, *layout.features), parse_dtype(node.meta["val"].dtype))

    def _describe(self, program: Program) -> None:
        """Facts of the model that the runtime and the passes ask for."""
        score = program.entries["score"]
        h = score.calls()[0].args[0].tensor
        program.meta = {
            "outputs": self.captured.outputs,
            "vocab": vocabulary(score, score.inputs[0]),
            "hidden": h.width,
            "dtype": h.dtype,
            "positions": self.positions,
            "causal": all(m.kind != "full" for s in self.structure.segments if (m := self._mask_of(s)) is not None),
        }


def _no_mask(site: Any) -> Any:
    raise UnsupportedModel("attention outside the blocks of the stream")


def _no_rotation(cos: fx.Node, sin: fx.Node) -> Value:
    raise UnsupportedModel("a rotation outside the blocks of the stream")
