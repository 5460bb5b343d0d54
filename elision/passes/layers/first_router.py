"""FiRST: routers read the prompt and say which layers its continuation runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from elision.errors import BadInput
from elision.ir.program import Program, Weights, round_of
from elision.ir.types import Tensor
from elision.ir.value import Builder, Graph, Value, rewrite
from elision.passes.base import Pass, register
from elision.passes.calibration import Calibrated, Choosing, Text
from elision.passes.layers.classifier import logistic
from elision.passes.layers.depth import caches_of, declare, decodes, without
from elision.passes.layers.parts import blocks, layer_streams, stream_after
from elision.passes.layers.shortgpt import left_out

log = logging.getLogger("elision")
_PART = 64  # tokens of a prompt that routers are fitted on


@register
@dataclass(frozen=True)
class FirstRouter(Choosing, Calibrated):
    """Depth by prompt (FiRST: Finetuning Router-Selective Transformers, Jain et al. 2024).

    The rewrite in one sentence: a linear router beside each of some layers reads the stream of the prompt, which runs all layers,
    and where the mean of its sigmoid is less than ``threshold`` the continuation leaves the layer out.

    The paper trains routers with the loss of the language and the model after them. Here the model stays as it is, and routers
    are logistic regressions on its streams: a layer is worth running for a prompt if its block influence there (`shortgpt`) is
    not among the lowest ``share`` of all layers of all prompts, on about ``tokens`` tokens in prompts of 64. Steps are compiled
    ahead, so they are nested: ``layers``, what was chosen, in the order of how often they are left out; a prompt leaves out the
    longest beginning of it that its routers leave out. The model's own forward is that of a prompt. Identity setting: share=0.
    """

    share: float = 0.0
    threshold: float = 0.5
    layers: tuple[int, ...] = ()
    tokens: int = 4096

    name: ClassVar[str] = "first-router"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "depth"

    @classmethod
    def example(cls, program: Program) -> FirstRouter:
        return cls(0.25, layers=(max(program.layers, default=0),))

    def choose(self, program: Program, weights: Weights, text: Text) -> Pass:
        count = left_out(self, self.share, program)
        if self.layers or not count:
            return self
        _, influence = self._streams(program, weights, text)
        seldom = (influence < influence.quantile(self.share)).float().mean(0)
        there = list(program.layers)
        order = sorted(range(len(there)), key=lambda i: (-float(seldom[i]), float(influence[:, i].mean())))
        found = [there[i] for i in order if seldom[i] > 0][: min(2 * count, len(there) - 1)]
        shares = ", ".join(f"{there[i]}: {float(seldom[i]):.0%}" for i in order[: len(found)])
        log.info("first-router: layers that are left out, and of how many prompts: %s", shares)
        return replace(self, layers=tuple(found))

    def apply(self, program: Program) -> None:
        count = left_out(self, self.share, program)
        decodes(program, self.name)
        if count and not self.layers:
            raise BadInput(f"first-router chooses on text, in elision.compile; or say what it chose: {self.text()},layers=25+26")
        if unknown := set(self.layers) - set(program.layers):
            raise BadInput(f"first-router: there is no layer {min(unknown)} in {program.name}")
        if not self.layers:
            return
        step = program.entries["step"]
        stream = stream_after(step).tensor
        for layer in self.layers:
            sizes = {f"router.{layer}.weight": (1, stream.width), f"router.{layer}.bias": (1,)}
            program.params |= {name: Tensor(size, stream.dtype) for name, size in sizes.items()}
        declare(program, {c for layer in self.layers for c in caches_of(program, layer)}, "nested", self.name)
        names = ["step"]
        for i in range(1, len(self.layers) + 1):
            names.append(f"step_{i}")
            program.entries[names[-1]] = without(program, program.entries["step"], self.layers[:i], names[-1])
        program.entries["prefill"] = self._routers(program)
        program.round = round_of(program, run=("routed", {"targets": tuple(names), "threshold": self.threshold}))

    def calibrate(self, program: Program, weights: Weights, text: Text) -> dict[str, torch.Tensor]:
        if not self.layers:
            return {}
        streams, influence = self._streams(program, weights, text)
        least, there = influence.quantile(self.share), list(program.layers)
        found: dict[str, torch.Tensor] = {}
        for layer in self.layers:
            i = there.index(layer)
            worth = (influence[:, i] >= least).float().repeat_interleave(streams[i].shape[1])
            w, b = logistic(streams[i].flatten(0, 1), worth)
            found |= {f"router.{layer}.weight": w[None].to(streams.dtype), f"router.{layer}.bias": b[None].to(streams.dtype)}
            log.info("first-router: router of layer %d is right of %.0f%%", layer, 100 * _right(streams[i], w, b, worth))
        return found

    def _routers(self, program: Program) -> Graph:
        """Prefill with the routers' results after the logits."""
        graph = program.entries["prefill"]
        first: dict[int, Value] = {}
        for layer, call in blocks(graph):
            first.setdefault(layer, call)
        at = {call: layer for layer, call in first.items()}
        made: dict[int, Value] = {}

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> None:
            if at.get(v) in self.layers:
                types = [(name, program.params[name]) for name in (f"router.{at[v]}.weight", f"router.{at[v]}.bias")]
                made[at[v]] = b.add("linear", args[0], *(b.param(name, type) for name, type in types), name="route")

        found = rewrite(graph, rule, program.targets, more=lambda: [made[layer] for layer in self.layers])
        count = len(graph.outputs)
        return replace(found, outputs=(found.outputs[0], *found.outputs[count:], *found.outputs[1:count]))

    def _streams(self, program: Program, weights: Weights, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream before every layer ``[layers, prompts, tokens, width]``, and the influence ``[prompts, layers]``."""
        sequences = text.sequences(program, self.tokens)
        length = min(_PART, *map(len, sequences))
        prompts = [part for ids in sequences for part in torch.split(ids, length) if len(part) == length]
        found = layer_streams(program, weights, prompts)
        found = found.view(len(found), len(prompts), length, -1)
        cosine = torch.nn.functional.cosine_similarity(found[:-1].double(), found[1:].double(), dim=-1)
        return found[:-1], 1 - cosine.mean(-1).T


def _right(streams: torch.Tensor, w: torch.Tensor, b: torch.Tensor, worth: torch.Tensor) -> float:
    return float((((streams.flatten(0, 1).float() @ w + b) > 0) == (worth > 0)).float().mean())
