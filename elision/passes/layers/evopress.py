"""EvoPress: search which attention and MLP halves to leave out."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

import torch

from elision.errors import BadInput
from elision.ir.program import Program, Weights
from elision.passes.base import Pass, register
from elision.passes.calibration import Choosing, Text, run_score
from elision.passes.layers.evolution import evolve
from elision.passes.layers.shortgpt import block_influence, left_out

log = logging.getLogger("elision")

TOP = 512  # of the full model's probabilities of a token, those that are compared
HALVES = ("attn", "mlp")
Halves = tuple[frozenset[int], frozenset[int]]  # what is left out: attention halves, MLP halves


@register
@dataclass(frozen=True)
class EvoPress(Choosing):
    """Leave out as many attention as MLP halves, chosen by an evolutionary search (EvoPress, Sieberling et al. 2024).

    The rewrite in one sentence: the sets of halves whose removal moves the model's distribution least, KL(full, pruned) on
    calibration text, are left out as by skip-layers. The search starts from the best of random sets and of the layers with the
    least block influence (the paper: of random sets). ``share``: of the halves of each kind, rounded down. ``generations`` of
    ``offspring`` children, which swap up to three halves; the best two on ``small`` tokens meet their parent on ``large`` tokens.
    The paper: 32 children, 2048 and 32768 tokens; the defaults are for two cores (20 generations of 6 children took 43 minutes
    for 135M parameters on a busy machine; less has not been shown). ``seed``: of the search. ``attn``, ``mlp``: what was chosen;
    given, nothing is searched. Identity setting: share=0.
    """

    share: float = 0.0
    attn: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    generations: int = 20
    offspring: int = 8
    small: int = 512
    large: int = 2048
    seed: int = 0

    name: ClassVar[str] = "evopress"
    family: ClassVar[str] = "layers"
    changes: ClassVar[str] = "blocks"

    @classmethod
    def example(cls, program: Program) -> EvoPress:
        first = next(iter(program.layers), 0)
        return cls(0.25, (first,), (first,))

    def choose(self, program: Program, weights: Weights, text: Text) -> Pass:
        count = self._count(program)
        if self.attn or self.mlp or not count:
            return self
        if min(self.generations, self.small) < 1 or self.offspring < 2 or self.large < self.small:
            raise BadInput(f"{self.text()}: expected generations, small >= 1, offspring >= 2 and large >= small")
        layers, random = list(program.layers), Random(self.seed)
        measure = Divergence(program, weights, text.sequences(program, 4 * self.large), random)
        began = time.monotonic()

        def told(generation: int, best: Halves, loss: float) -> None:
            took = time.monotonic() - began
            log.info("evopress: generation %d of %d, KL %.4f, %.0f s", generation, self.generations, loss, took)

        influence = block_influence(program, weights, text.sequences(program, self.large))
        least = frozenset(sorted(influence, key=influence.__getitem__)[:count])
        start = [(least, least), *(_draw(layers, count, random) for _ in range(self.offspring - 1))]
        best = evolve(
            start, lambda parent, random: _mutated(parent, layers, random), measure, generations=self.generations,
            offspring=self.offspring, stages=((self.small, 2), (self.large, 1)), random=random, report=told,
        )  # fmt: skip
        attn, mlp = (tuple(sorted(half)) for half in best)
        return replace(self, attn=attn, mlp=mlp)

    def apply(self, program: Program) -> None:
        if self._count(program) and not (self.attn or self.mlp):
            raise BadInput(f"evopress searches on text, in elision.compile; or say what it found: {self.text()},attn=3+7,mlp=2+5")
        leave_out(program, (frozenset(self.attn), frozenset(self.mlp)))

    def _count(self, program: Program) -> int:
        count = left_out(self, self.share, program)
        whole = [i for i, layer in program.layers.items() if not set(HALVES) <= set(layer.parts)]
        if count and whole:
            raise BadInput(f"evopress: layer {whole[0]} of {program.name} has no halves attn and mlp; use shortgpt")
        return count


def leave_out(program: Program, halves: Halves) -> None:
    """Leave halves out of every entry. Raises BadInput for one that is not there."""
    there = program.layers
    for half, indices in zip(HALVES, halves, strict=True):
        for index in sorted(indices):
            if index not in there:
                raise BadInput(f"evopress: there is no layer {index} in {program.name}")
            there[index].bypass(half)


class Divergence:
    """KL(full, pruned) per token, on sequences drawn anew for every call; less is better. The full model runs once, and the `TOP`
    largest probabilities of each token are kept."""

    def __init__(self, program: Program, weights: Weights, sequences: list[torch.Tensor], random: Random) -> None:
        self._program, self._weights, self._sequences, self._random = program, weights, sequences, random
        self._full = []
        for ids in sequences:
            logits = run_score(program, weights, [ids])[0].float()
            top = logits.topk(min(TOP, logits.shape[-1]))
            self._full.append((top.values - logits.logsumexp(-1, keepdim=True), top.indices))

    def __call__(self, candidates: Sequence[Halves], size: int) -> list[float]:
        count = min(len(self._sequences), max(1, round(size / max(map(len, self._sequences)))))
        batch = self._random.sample(range(len(self._sequences)), count)
        return [self._of(halves, batch) for halves in candidates]

    def _of(self, halves: Halves, batch: Sequence[int]) -> float:
        pruned = self._program.copy()
        leave_out(pruned, halves)
        logits = run_score(pruned, self._weights, [self._sequences[i] for i in batch])[0].float()
        full, index = (torch.cat([self._full[i][part] for i in batch]) for part in (0, 1))
        found = logits.gather(-1, index) - logits.logsumexp(-1, keepdim=True)
        return float((full.exp() * (full - found)).sum(-1).mean())


def _draw(layers: Sequence[int], count: int, random: Random) -> Halves:
    return frozenset(random.sample(layers, count)), frozenset(random.sample(layers, count))


def _mutated(parent: Halves, layers: Sequence[int], random: Random) -> Halves:
    """One to three swaps, few more often than many, each of one half that is left out with one that is not."""
    halves = [set(half) for half in parent]
    for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
        half = halves[random.randrange(2)]
        out, back = random.choice(sorted(set(layers) - half)), random.choice(sorted(half))
        half.symmetric_difference_update((out, back))
    return frozenset(halves[0]), frozenset(halves[1])
