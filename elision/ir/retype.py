"""Change how weights are stored: in the types of a program, and in the tensors that go with it."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from elision.errors import BadInput
from elision.ir.blocks import Stored
from elision.ir.op import lookup
from elision.ir.program import Program, Weights
from elision.ir.types import FLOATS, Tensor
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.ir.walk import CONTROL, sites
from elision.ir.weights import SAME_BYTES, Blocks, WeightEncoding


def encodable(program: Program) -> dict[str, Tensor]:
    """The float weights that are read only where an op takes encoded ones: by `linear`, `embed` and `experts`."""
    found: dict[str, bool] = {}
    for graph in (*program.entries.values(), *(t.graph for t in program.ticks)):
        for site in sites(program, graph):
            if site.value.op in CONTROL:
                continue
            for i, operand in enumerate(site.value.args):
                begin = site.frame.source(operand)[1]
                if begin.op == "param":
                    name = begin.attr("name")
                    found[name] = found.get(name, True) and i in lookup(site.value.op).encoded
    return {n: t for n, t in program.params.items() if found.get(n) and t.encoding is None and t.dtype in FLOATS}


def store(program: Program, encodings: Mapping[str, WeightEncoding]) -> None:
    """Give the parameters named other encodings, in place. A template that is called with different ones becomes several.

    Raises BadInput for a weight whose rows are no whole groups, or that an op reads which takes no encoded weights.
    """
    program.params = {n: t.stored(encodings[n]) if n in encodings else t for n, t in program.params.items()}
    work = _Retyper(program)
    for name, graph in program.entries.items():
        program.entries[name] = work.retyped(graph)
    program.ticks = tuple(replace(t, graph=work.retyped(t.graph)) for t in program.ticks)
    if program.round is not None:
        program.round = work.retyped(program.round)
    program.templates = work.made


@dataclass
class _Retyper:
    """``made``: the templates so far; ``names``: which of them stands for a template with operands of these encodings."""

    program: Program
    made: dict[str, Graph] = field(default_factory=dict)
    names: dict[tuple[str, tuple[WeightEncoding | None, ...]], str] = field(default_factory=dict)

    def retyped(self, graph: Graph, inputs: tuple[WeightEncoding | None, ...] = ()) -> Graph:
        """The graph on parameters of the program's types, its inputs in the given encodings."""
        given = dict(zip(graph.inputs, inputs, strict=False))
        templates = self.program.templates

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v.op == "param":
                return b.param(v.attr("name"), self.program.params[v.attr("name")])
            if v.op == "input" and isinstance(v.type, Tensor):
                return b.input(v.attr("name"), v.type.stored(given.get(v)))
            if (name := v.attr("target")) in templates:
                formals = templates[name].inputs
                encodings = tuple(_encoding(a) for a in args[len(args) - len(formals) :])
                attrs = {**dict(v.attrs), "target": self.template(name, encodings)}
                return b.add_with(v.op, args, attrs, None, graph.names.get(v))
            return None

        return rewrite(graph, rule, ChainMap(self.made, self.program.entries), keep=True)

    def template(self, name: str, encodings: tuple[WeightEncoding | None, ...]) -> str:
        """The name of a template on operands of these encodings, made if there is none."""
        key = (name, encodings)
        if key not in self.names:
            graph = self.retyped(self.program.templates[name], encodings)
            taken = {**self.program.targets, **self.made}
            others = (n for i in range(1, len(taken) + 1) if (n := f"{name}_{i}") not in taken)
            new = name if name not in self.made else next(others)
            self.made[new] = replace(graph, name=new)
            self.names[key] = new
        return self.names[key]


def _encoding(value: Value) -> WeightEncoding | None:
    return value.type.encoding if isinstance(value.type, Tensor) else None


def convert(
    weights: Weights, before: Mapping[str, Tensor], after: Mapping[str, Tensor], stored: Mapping[str, Stored] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that hold the weights of types ``after``, from those of types ``before`` or, where these are in the encoding
    that is asked for, from the blocks ``stored`` in the model's file. Raises BadInput for a weight that cannot be encoded."""
    return {name: _converted(name, weights[name], before[name], type, (stored or {}).get(name)) for name, type in after.items()}


def _converted(name: str, weight: torch.Tensor, before: Tensor, after: Tensor, stored: Stored | None) -> torch.Tensor:
    if before == after:
        return weight
    wanted = after.encoding
    if wanted is None or before.encoding is not None or before.axes != after.axes:
        raise BadInput(f"{name} is {before}, and cannot become {after}; compile the model again")
    if stored is not None and Blocks(stored.format) in (wanted, SAME_BYTES.get(wanted)):
        return stored.in_order().clone()  # the file may go away
    try:
        return wanted.encode(weight)
    except BadInput as err:
        raise BadInput(f"{name}: {err}") from err
