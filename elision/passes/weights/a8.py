"""Eight-bit integer activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from elision.errors import BadInput
from elision.ir.interp import Interpreter
from elision.ir.program import Program, Weights
from elision.ir.tokens import Tokens
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.ir.weights import GROUP, integer_groups
from elision.passes.base import Pass, register


@register
@dataclass(frozen=True)
class Int8Activations(Pass):
    """Multiply integer weights by integers: dynamic activation quantisation (ZeroQuant, Yao et al. 2022; LLM.int8, Dettmers et
    al. 2022), in groups as fine as those of the weights.

    The rewrite in one sentence: the input of every `linear` whose weight is stored as integers (int8 or int4 with groups of 32,
    int8 per row, Q8_0, Q4_0, Q4_1) is rounded to signed bytes, 32 channels of a token sharing the scale max|x| / 127.
    """

    name: ClassVar[str] = "a8"
    family: ClassVar[str] = "weights"
    changes: ClassVar[str] = "encodings"

    def apply(self, program: Program) -> None:
        count = sum(_takes(v) for graph in program.graphs().values() for v in graph.values)
        if not count:
            kinds = sorted({str(t.encoding or "plain " + t.dtype) for t in program.params.values() if len(t.axes) > 1})
            raise BadInput(
                f"a8: {program.name} has no linear with integer weights in groups of {GROUP} (weights are {', '.join(kinds)}); "
                "put int8, int4 or stored before it, as in passes=['int8', 'a8']"
            )
        _set(program, GROUP)


def error(program: Program, weights: Weights, ids: torch.Tensor) -> float:
    """What rounding activations does to the logits of the tokens ``ids [n]``: ``|with - without| / |without|`` over all of them.

    Runs the reference semantics twice, so it takes seconds for a model of some hundred million parameters.
    """
    plain = program.copy()
    _set(plain, 0)
    graph = program.entries["score"]
    inputs, at = {graph.names[graph.inputs[0]]: ids}, Tokens.chunk([len(ids)], [0])
    axis = graph.inputs[0].tensor.tokens
    assert axis is not None
    found, expected = (Interpreter(p, weights).run(p.entries["score"], inputs, {axis.name: at})[0] for p in (program, plain))
    return float((found - expected).norm() / expected.norm())


def _takes(value: Value) -> bool:
    if value.op != "linear":
        return False
    weight = value.args[1].tensor
    return integer_groups(weight.encoding, weight.row)


def _set(program: Program, group: int) -> None:
    """Round the inputs of all linears that can take it in groups of that size, or of none (0)."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if not _takes(v):
            return None
        attrs = {k: a for k, a in v.attrs if k != "a8"} | ({"a8": group} if group else {})
        return b.add_with(v.op, args, attrs, None)

    def rewritten(graph: Graph) -> Graph:
        return rewrite(graph, rule, program.targets, keep=True)

    program.templates = {name: rewritten(g) for name, g in program.templates.items()}
    program.entries = {name: rewritten(g) for name, g in program.entries.items()}
    program.ticks = tuple(replace(t, graph=rewritten(t.graph)) for t in program.ticks)
    program.round = rewritten(program.round) if program.round is not None else None
