"""G-Search and P-Sigmoid: how much of a prompt each layer needs, searched on text."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from elision.errors import BadInput
from elision.ir.interp import Interpreter
from elision.ir.program import Program, Weights, state_inputs
from elision.ir.states import KV
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.ir.types import DTYPES
from elision.passes.base import Pass, register
from elision.passes.calibration import Choosing, Text
from elision.passes.tokens.prompts import Choice, prune_prompts

log = logging.getLogger("elision")

AHEAD = 32  # tokens after a prompt whose distributions are compared
SLOPES = (4.0, 8.0, 16.0, 32.0)  # of sigmoids that are tried
GRID = 5  # per cent


@register
@dataclass(frozen=True)
class GSearch(Choosing):
    """Later layers see less of a prompt, as much as a search finds that they need (G-Search and P-Sigmoid, Zhao et al. 2024).

    The rewrite in one sentence: before each of a few layers only a share of the prompt stays, by the attention that its last
    tokens give in the layer before, as by `fastv`. With ``budget``, the mean over layers of the share that they see, the shares
    lie on a sigmoid of the depth that meets it, of the slope that moves the model's distribution least on calibration text (the
    paper fits it by Bayesian optimisation). With ``eps``, from shallow to deep each share is the smallest for which that
    divergence, KL per token of the text after a prompt, stays at most eps (the paper: a score falls by at most 0 to 1 %).
    ``steps``: layers where tokens are left out, spread evenly (the paper: all); ``prompts``: how many are calibrated on;
    ``last``, ``first``: as of fastv. ``layers`` and ``keep`` (per cent of the prompt): what was chosen; given, nothing is
    searched. Identity setting: budget=1.
    """

    budget: float = 0.0
    eps: float = 0.0
    steps: int = 4
    layers: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    prompts: int = 8
    last: int = 1
    first: int = 1

    name: ClassVar[str] = "g-search"
    family: ClassVar[str] = "tokens"
    changes: ClassVar[str] = "tokens"

    @classmethod
    def example(cls, program: Program) -> GSearch:
        return cls(layers=(max(list(program.layers)[:2], default=1),), keep=(50,))

    def choose(self, program: Program, weights: Weights, text: Text) -> Pass:
        if self.keep or self.layers or self.budget == 1:
            return self
        asked = 0 <= self.budget <= 1 and self.eps >= 0 and bool(self.budget) != bool(self.eps)
        if not asked or self.steps < 1 or self.prompts < 1:
            raise BadInput(f"{self.text()}: expected a budget up to 1 or eps above 0, one of the two, and steps, prompts >= 1")
        layers = cut_layers(list(program.layers), self.steps)
        sequences = text.sequences(program, self.prompts * 512)
        measure = Divergence(program, weights, sequences, lambda p, keep: self._prune(p, layers, keep))
        if self.eps:
            keep = greedy(len(layers), lambda keep: measure(keep) <= self.eps)
        else:
            found = [sigmoid(list(program.layers), layers, self.budget, slope) for slope in SLOPES]
            lines = list(dict.fromkeys(line for line in found if line))
            if not lines:
                raise BadInput(f"{self.text()}: layers before {layers[0]} see all of a prompt; a budget that small is not met")
            keep = min(lines, key=measure)
        log.info("g-search: layers %s keep %s %%, KL %.4f", layers, keep, measure(keep))
        return replace(self, layers=layers, keep=keep)

    def apply(self, program: Program) -> None:
        if self.budget == 1 and not self.keep:
            return
        if len(self.layers) != len(self.keep) or not self.keep or list(self.layers) != sorted(set(self.layers)):
            raise BadInput(
                f"g-search searches on text, in elision.compile; or say what it found, layers in order and per cent of a prompt "
                f"for each: {self.name}:layers=2+10,keep=80+40"
            )
        self._prune(program, self.layers, self.keep)

    def _prune(self, program: Program, layers: Sequence[int], keep: Sequence[int]) -> None:
        shares = {layer: share / 100 for layer, share in zip(layers, keep, strict=True)}
        prune_prompts(program, self.name, shares, Choice(self.last, self.first))


def cut_layers(layers: list[int], steps: int) -> tuple[int, ...]:
    """Where tokens are left out: ``steps`` of the layers, evenly, from the third on (the first two rank tokens badly)."""
    later = layers[2:] or layers[1:]
    if not later:
        raise BadInput("g-search: expected at least two layers")
    count = min(steps, len(later))
    return tuple(later[i * len(later) // count] for i in range(count))


def greedy(count: int, good: Callable[[tuple[int, ...]], bool]) -> tuple[int, ...]:
    """Shares in per cent, from shallow to deep each the smallest of a grid with which, taken from there on, all is still good."""
    found: tuple[int, ...] = ()
    for i in range(count):
        low, high = 1, (found[-1] if found else 100) // GRID  # the first, in steps of the grid, may be good; the last is
        while low < high:
            middle = (low + high) // 2
            if good((*found, *((middle * GRID,) * (count - i)))):
                high = middle
            else:
                low = middle + 1
        found = (*found, high * GRID)
    return found


def sigmoid(layers: list[int], cuts: Sequence[int], budget: float, slope: float) -> tuple[int, ...]:
    """Shares in per cent before each of the cuts, on ``1 / (1 + exp(slope (l / L - c)))`` scaled to 1 at the first layer, of the
    midpoint c for which the mean over layers of what they see is the budget (at least 1 % each, whole per cents). Empty where no
    midpoint meets it."""

    def line(c: float) -> list[float]:
        top = 1 / (1 + math.exp(-slope * c))
        return [1 / (1 + math.exp(slope * (layers.index(cut) / len(layers) - c))) / top for cut in cuts]

    def mean(shares: Sequence[float]) -> float:
        seen = [next((s for cut, s in reversed(list(zip(cuts, shares, strict=True))) if cut <= i), 1.0) for i in layers]
        return sum(seen) / len(seen)

    low, high = -2.0, 3.0
    for _ in range(50):
        c = (low + high) / 2
        low, high = (c, high) if mean(line(c)) < budget else (low, c)
    shares = tuple(min(100, max(1, round(100 * share))) for share in line(high))
    return shares if mean([share / 100 for share in shares]) < budget + 0.02 else ()


class Divergence:
    """KL(full, pruned) per token of the text after a prompt, over the ends of some sequences; less is better."""

    def __init__(
        self, program: Program, weights: Weights, sequences: list[torch.Tensor], prune: Callable[[Program, Sequence[int]], None]
    ) -> None:
        self._program, self._weights, self._prune = program, weights, prune
        self._sequences = [ids for ids in sequences if len(ids) >= 4]
        if not self._sequences:
            raise BadInput("g-search: expected sequences of at least 4 tokens to calibrate on")
        self._full = [self._ends(program, ids) for ids in self._sequences]

    def __call__(self, keep: Sequence[int]) -> float:
        pruned = self._program.copy()
        self._prune(pruned, keep)
        pairs = [(full, self._ends(pruned, ids)) for full, ids in zip(self._full, self._sequences, strict=True)]
        return float(torch.cat([(full.exp() * (full - got)).sum(-1) for full, got in pairs]).mean())

    def _ends(self, program: Program, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities after the prompt and each token that follows it ``[tokens, vocab]``."""
        ahead = min(AHEAD, len(ids) // 2)
        n, runs = len(ids) - ahead, Interpreter(program, self._weights)
        prefill, step = program.entries["prefill"], program.entries["step"]
        wide = DTYPES[program.meta["dtype"]]
        stores: dict[str, Any] = {name: KVStore(t, 1, len(ids), wide) for name, t in program.states.items() if isinstance(t, KV)}

        def run(graph: Any, ids: torch.Tensor, at: Tokens) -> torch.Tensor:
            first = graph.inputs[0]
            given = {graph.names[first]: ids, **{name: stores[name] for name in state_inputs(graph)}}
            return runs.run(graph, given, {first.tensor.tokens.name: at})[0]  # type: ignore[no-any-return]

        with torch.inference_mode():
            after = run(prefill, ids[:n], Tokens.chunk([n], [0]))
            row, pos, parent, anc = pack([Tree(tuple(range(-1, ahead - 1)))], [n])
            chain = Tokens(row, pos, 1, parent, anc)
            return torch.cat((after, run(step, ids[n:], chain))).float().log_softmax(-1)
