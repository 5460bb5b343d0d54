"""Passes whose drafts a model makes: the program itself with layers left out, or another one that is merged into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from elision.errors import BadInput
from elision.ir.drafting.drafter import text_of
from elision.ir.drafting.growth import growth_of
from elision.ir.program import QUALITIES, Program, bypassing, drafting, round_of
from elision.ir.states import KV
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.passes.base import Pass
from elision.passes.cache import SCRATCH

#: Fields that say where drafts come from; the others say how their trees grow.
SOURCES = ("layers", "exit", "exits", "model")


@dataclass(frozen=True)
class ModelPass(Pass):
    """Base of a pass that speculates with a model. Greedy output does not change; sampled output not either with rule "match",
    with other rules not its distribution. A draft that is the whole model has all of its tokens accepted."""

    family: ClassVar[str] = "speculate"
    changes: ClassVar[str] = "round"
    quality: ClassVar[str] = "exact"

    def apply(self, program: Program) -> None:
        if program.round is None:
            raise BadInput(f"{self.name}: {program.name} does not generate (it has no round), so there is nothing to draft")
        if methods := drafting(program.round)[1]:
            raise BadInput(f"{self.name}: drafts come from {', '.join(methods)} already; a model drafts alone: leave one out")
        fields = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in SOURCES]
        text = text_of(self.name, fields)
        growth = growth_of(text)
        self.add_drafts(program)
        program.round = round_of(program, SCRATCH, (text,))
        if growth.rule != "match":
            program.quality = max(program.quality, "distribution", key=QUALITIES.index)

    def add_drafts(self, program: Program) -> None:
        """Add the entries with which the round drafts: skip ``layers`` or all from ``exit`` on, or take them from ``model``."""
        layers: tuple[int, ...] = getattr(self, "layers", ())
        exit: int = getattr(self, "exit", 0)
        model: str = getattr(self, "model", "")
        if bool(layers) + bool(exit) + bool(model) != 1:
            sources = " or ".join(f"{n}=" for n in SOURCES if hasattr(self, n))
            raise BadInput(f"{self.name}: say where drafts come from, by one of {sources}")
        if model:
            adopt(program, open_model(program, model), self.name)
        else:
            program.entries["draft"] = without(program, layers or after(program, exit, self.name), "draft", self.name)

    def brought(self, program: Program) -> Mapping[str, torch.Tensor]:
        """The weights that the pass adds to those of the program, by name."""
        model = getattr(self, "model", "")
        return {f"draft.{name}": w for name, w in open_model(program, model)[1].items()} if model else {}


def after(program: Program, exit: int, by: str) -> list[int]:
    """The layers from ``exit`` on."""
    if not 1 <= exit <= max(program.layers, default=-1) + 1:
        raise BadInput(f"{by}: exit={exit}; expected 1 to {max(program.layers, default=-1) + 1}, the layers that a draft runs")
    return [i for i in program.layers if i >= exit]


def without(program: Program, layers: Iterable[int], name: str, by: str) -> Graph:
    """The entry ``step`` that leaves out some layers, as one that drafts: the same operands, logits and states as results."""
    there, layers = program.layers, set(layers)
    if unknown := sorted(layers - set(there)):
        raise BadInput(f"{by}: there is no layer {unknown[0]}; the layers of {program.name} are {', '.join(map(str, there))}")
    labels = {f"{i}.{part}" for i in layers for part in there[i].parts}
    return rewrite(_drafts(program.entries["step"], name), bypassing(labels), program.targets)


def _drafts(step: Graph, name: str) -> Graph:
    """The entry ``step`` without the likeliest tokens: `guess` finds what it needs in the logits."""
    return replace(step, name=name, outputs=tuple(v for i, v in enumerate(step.outputs) if i == 0 or v.is_state))


def open_model(program: Program, path: str) -> tuple[Program, Mapping[str, torch.Tensor]]:
    """Another compiled model's program and weights. Raises BadInput where there is none."""
    if program.models is None:
        raise BadInput(f"model={path}: other models can be opened by elision.compile only")
    return program.models(path)


def adopt(program: Program, other: tuple[Program, Mapping[str, torch.Tensor]], by: str) -> None:
    """Make another model's ``step`` the entry ``draft`` and its ``prefill`` the entry ``feed``, with what they need under names
    of their own. Raises BadInput for one that cannot draft for this program."""
    draft = other[0]
    _check(program, draft, by)
    program.params |= {f"draft.{n}": t for n, t in draft.params.items()}
    program.states |= {f"draft_{n}": t for n, t in draft.states.items()}

    def moved(graph: Graph, entry: bool) -> Graph:
        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v.op == "param":
                return b.param(f"draft.{v.attr('name')}", v.tensor)
            if v.op == "input" and entry and isinstance(v.type, KV):
                return b.input(f"draft_{v.attr('name')}", v.type)
            if (target := v.attr("target")) is None:
                return None
            attrs = {**dict(v.attrs), "target": f"draft_{target}"}
            if label := v.attr("label"):
                attrs["label"] = f"draft.{label}"
            return b.add_with(v.op, args, attrs, None, graph.names.get(v))

        return rewrite(graph, rule, program.targets)

    for name, graph in draft.templates.items():
        program.templates[f"draft_{name}"] = moved(replace(graph, name=f"draft_{name}"), False)
    program.entries["draft"] = moved(_drafts(draft.entries["step"], "draft"), True)
    program.entries["feed"] = moved(replace(draft.entries["prefill"], name="feed"), True)
    program.meta["draft_positions"] = draft.meta["positions"]


def _check(program: Program, draft: Program, by: str) -> None:
    if draft.round is None or draft.ticks or not all(isinstance(t, KV) for t in draft.states.values()):
        raise BadInput(f"{by}: {draft.name} cannot draft: expected a decoder with caches that nothing evicts from")
    for what, name in (("vocab", "a vocabulary"), ("dtype", "activations")):
        ours, theirs = program.meta[what], draft.meta[what]
        if ours != theirs:
            raise BadInput(f"{by}: {draft.name} has {name} of {theirs}, {program.name} of {ours}: they must be equal")
    if any(len([v for v in p.entries["step"].inputs if not v.is_state]) != 1 for p in (program, draft)):
        raise BadInput(f"{by}: {draft.name} or {program.name} needs more than token ids to run")
