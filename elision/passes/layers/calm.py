"""CALM: a token leaves the stream where it is sure of what comes next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from elision.errors import BadInput
from elision.ir.ops.exits import RULES
from elision.ir.program import Program, Weights, round_of
from elision.ir.value import Builder, Graph, Value, live, rewrite
from elision.passes.base import register
from elision.passes.calibration import Calibrated, Text
from elision.passes.layers.classifier import fit, parameters
from elision.passes.layers.deferring import deferring
from elision.passes.layers.depth import caches_of, declare, decodes
from elision.passes.layers.parts import blocks, cut, filling, stream_after, stream_before

#: How caches of later layers learn of what left, and what they declare.
FILLS = {"propagate": "all", "mask": "masked", "defer": "deferred"}


@register
@dataclass(frozen=True)
class CALM(Calibrated):
    """Early exit by confidence (Confident Adaptive Language Modeling, Schuster et al. 2022).

    The rewrite in one sentence: a step runs in parts, and a node whose confidence before one of the layers ``exits`` (text:
    ``10+15+20``) reaches ``threshold`` goes from there to the head; the later layers get keys and values of its stream
    there (``fill`` propagate), or none, so that no later token sees it in them (mask), or their own, of the layers run on it
    once a later token goes there (defer: what later tokens see is what the whole model computed).

    ``rule``: of confidence, see `elision.ir.ops.exits`; ``classifier`` is fitted on about ``tokens`` tokens of calibration
    text to say whether the likeliest token here is that of the whole model. ``length``: in so many positions the threshold falls
    to 0.9 of what is given (0: it stays; the paper: the longest output). Prompts run all layers; the model's own forward treats
    all of its tokens as generated, computing all layers and choosing. The paper trains for it; untrained models lose much.
    Identity setting: a threshold above 1, or no exits.
    """

    exits: tuple[int, ...] = ()
    threshold: float = 0.98
    rule: str = "similarity"
    fill: str = "propagate"
    length: int = 0
    tokens: int = 4096

    name: ClassVar[str] = "calm"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "depth"

    @classmethod
    def example(cls, program: Program) -> CALM:
        return cls((max(program.layers, default=1),))

    def apply(self, program: Program) -> None:
        decodes(program, self.name)
        if self.rule not in RULES or self.fill not in FILLS or self.length < 0 or not self.threshold > 0:
            raise BadInput(
                f"{self.text()}: expected a rule of {', '.join(RULES)}, a fill of {', '.join(FILLS)}, length >= 0, threshold > 0"
            )
        layers, exits = list(program.layers), sorted(set(self.exits))
        if unknown := [e for e in exits if e not in layers[1:]]:
            raise BadInput(f"calm: exits={unknown[0]}; expected layers there are but {layers[0]}, before which tokens leave")
        if not exits:
            return
        later = [name for i in layers if i >= exits[0] for name in caches_of(program, i)]
        if self.rule == "classifier":
            program.params |= parameters(stream_after(program.entries["step"]).tensor.width)
        declare(program, later, FILLS[self.fill], self.name)
        if self.fill == "defer":
            deferring(program, exits, self.name)
        step = program.entries["step"]
        head = cut(program, step, "head", stream_after(step), step.outputs[:2], (), self.name)
        self._in_parts(program, head, layers, exits)
        program.entries["score"] = self._choosing(program, head, exits)
        kind = {"propagate": "fill", "defer": "late"}.get(self.fill)
        fills = [f"{kind}_{i}" for i in range(1, len(exits) + 1)] if kind else []
        parts = [f"part_{i}" for i in range(len(exits) + 1)]
        run: dict[str, Any] = {"targets": (*parts, *fills, "head"), "parts": len(parts)}
        program.round = round_of(program, run=("exits", run | ({"held": len(exits)} if self.fill == "defer" else {})))

    def calibrate(self, program: Program, weights: Weights, text: Text) -> dict[str, torch.Tensor]:
        if self.rule != "classifier" or not self.exits:
            return {}
        return fit(program, weights, sorted(set(self.exits)), text.sequences(program, self.tokens))

    def _in_parts(self, program: Program, head: Graph, layers: list[int], exits: list[int]) -> None:
        """Add the entries that the round runs."""
        step, on = self._decided(program, head, exits)
        starts, ends = [layers[0], *exits], [*exits, layers[-1] + 1]
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            x = stream_before(step, start) if i else next(v for v in step.inputs if not v.is_state)
            last = i == len(exits)
            results = (stream_after(step),) if last else (stream_before(step, end), on[i])
            mine = [c for n in layers if start <= n < end for c in caches_of(program, n)]
            program.entries[f"part_{i}"] = cut(program, step, f"part_{i}", x, results, mine, self.name)
            if i and self.fill == "propagate":
                program.entries[f"fill_{i}"] = filling(program, f"fill_{i}", [n for n in layers if n >= start])
        program.entries["head"] = head

    def _decided(self, program: Program, head: Graph, exits: list[int]) -> tuple[Graph, list[Value]]:
        """The step, and for each exit which tokens go on there."""
        on: list[Value] = []
        heads = _first_calls(program.entries["step"])

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> None:
            if v in heads:
                if heads[v] in exits:
                    on.append(self._undecided(b, head, args[0], streams[-1]))
                streams.append(args[0])

        streams: list[Value] = []
        graph = rewrite(program.entries["step"], rule, program.targets, more=lambda: on)
        return replace(graph, outputs=graph.outputs[: -len(on)]), on

    def _where_left(self, b: Builder, h: Value, left: list[Value], exited: list[Value]) -> Value:
        """``h`` of the tokens that are still there, and of the others what is known."""
        return b.add("lift", b.add("restrict", h, exited[-1]), left[0], exited[-1], name="left") if left else h

    def _undecided(self, b: Builder, head: Graph, h: Value, before: Value, *on: Value) -> Value:
        if self.rule == "similarity":
            more = [before]
        elif self.rule == "softmax":
            more = [_applied(b, head, h)]
        else:
            more = [b.param(name, type) for name, type in parameters(h.tensor.width).items()]
        attrs = {"rule": self.rule, "threshold": self.threshold} | ({"length": self.length} if self.length else {})
        return b.add("undecided", h, *more, *on, **attrs, name="on")  # type: ignore[no-any-return]

    def _choosing(self, program: Program, head: Graph, exits: list[int]) -> Graph:
        """The model's own forward, of all tokens in every layer: those that have left keep their stream (``fill=mask``: and are
        not among what the others see; ``fill=defer``: for the head alone)."""
        heads = _first_calls(program.entries["score"])
        streams: list[Value] = []
        on: list[Value] = []
        exited: list[Value] = []
        left: list[Value] = []  # the stream where each token left, of those that have so far (fill=defer)
        last = blocks(program.entries["score"])[-1][1]

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
            if v in heads:
                if heads[v] in exits:
                    on.append(self._undecided(b, head, args[0], streams[-1], *on[-1:]))
                    if self.fill == "defer":
                        left[:] = [self._where_left(b, args[0], left, exited)]
                    exited.append(b.add("which", on[-1], axis=f"on_{len(on)}"))
                streams.append(args[0])
            if v.op != "call" or not exited:
                return None
            if self.fill == "defer":
                if v is not last:
                    return None
                found = b.add_with("call", args, dict(v.attrs), None)
                results = b.items(found) if isinstance(found.type, tuple) else [found]
                h = self._where_left(b, results[0], left, exited)
                return (h, *results[1:]) if isinstance(found.type, tuple) else h
            h, few = args[0], b.add("restrict", args[0], exited[-1], name="h")
            if self.fill == "mask":
                args = (few, *(b.add("empty", few, type=a.type) if a.is_state else a for a in args[1:]))
            found = b.add_with("call", args, dict(v.attrs), None)
            results = b.items(found) if isinstance(found.type, tuple) else [found]
            taken = results[0] if self.fill == "mask" else b.add("restrict", results[0], exited[-1])
            lifted = b.add("lift", taken, h, exited[-1], name="h")
            return (lifted, *results[1:]) if isinstance(found.type, tuple) else lifted

        return rewrite(program.entries["score"], rule, program.targets)


def _first_calls(graph: Graph) -> dict[Value, int]:
    """The first call of every layer, with its layer."""
    found: dict[int, Value] = {}
    for layer, call in blocks(graph):
        found.setdefault(layer, call)
    return {call: layer for layer, call in found.items()}


def _applied(b: Builder, head: Graph, h: Value) -> Value:
    """The logits of a stream."""
    known = {head.inputs[0]: h}
    wanted = live(replace(head, inputs=(), outputs=head.outputs[:1]))
    for v in head.values:
        if v in wanted and v not in known:
            args = [known[a] for a in v.args]
            known[v] = b.param(v.attr("name"), v.tensor) if v.op == "param" else b.add_with(v.op, args, dict(v.attrs), None)
    return known[head.outputs[0]]
