"""EvoPress: search which attention and MLP halves to leave out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

import torch

from elision.errors import BadInput
from elision.ir.interp import Interpreter
from elision.ir.program import Program, Weights
from elision.ir.tokens import Tokens
from elision.passes.base import Pass, register
from elision.passes.calibration import Choosing, Text
from elision.passes.layers.evolution import evolve
from elision.passes.layers.parts import blocks, cut, stream_after
from elision.passes.layers.shortgpt import left_out

log = logging.getLogger("elision")

TOP = 512  # of the full model's probabilities of a token, those that are compared
SHORT = 256  # tokens of a sequence that candidates are compared on
TOGETHER = 4  # sequences of one forward: more take memory that is slower than what is saved
HALVES = ("attn", "mlp")
Halves = tuple[frozenset[int], frozenset[int]]  # what is left out: attention halves, MLP halves


@register
@dataclass(frozen=True)
class EvoPress(Choosing):
    """Leave out as many attention as MLP halves, chosen by an evolutionary search (EvoPress, Sieberling et al. 2024).

    The rewrite in one sentence: the sets of halves whose removal moves the model's distribution least, KL(full, pruned) on
    calibration text, are left out as by skip-layers. The search starts from the best of random sets and of the layers with the
    least block influence, and of the halves (the paper: of random sets); swaps prefer what has little influence, and half of them
    swap whole layers.

    ``share``: of the halves of each kind, rounded down. ``generations`` of ``offspring`` children, which swap up to three
    halves, compared in stages on ``small`` to ``large`` tokens, in sequences of 256, always with their parent on the same ones.
    The paper: 32 children, 2048, 16384 and 65536 tokens, drawn anew; the defaults are for 135M parameters and 15 minutes of two
    cores. ``seed``: of the search. ``attn``, ``mlp``: what was chosen; given, nothing is searched. Identity setting: share=0.
    """

    share: float = 0.0
    attn: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    generations: int = 40
    offspring: int = 8
    small: int = 512
    large: int = 8192
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
        began = time.monotonic()
        sequences = [part for ids in text.sequences(program, self.large) for part in torch.split(ids, SHORT)]

        def told(generation: int, best: Halves, loss: float) -> None:
            took, now = time.monotonic() - began, self._chosen(best).text()
            log.info("generation %d of %d, KL %.4f, %.0f s: %s", generation, self.generations, loss, took, now)

        with _quick_products():
            measure = Divergence(program, weights, sequences)
            order = [measure.ranked(half) for half in HALVES]
            whole = frozenset(measure.ranked("")[:count])
            start = [(whole, whole), (frozenset(order[0][:count]), frozenset(order[1][:count]))]
            start += [_draw(layers, count, random) for _ in range(self.offspring - 2)]
            best = evolve(
                start, lambda parent, random: _mutated(parent, order, random), measure, generations=self.generations,
                offspring=self.offspring, stages=self._stages(len(sequences)), random=random, report=told,
            )  # fmt: skip
        return self._chosen(best)

    def _stages(self, parts: int) -> list[tuple[int, int]]:
        """Sequences and survivors: from ``small`` tokens to all by equal factors, and from a third of the children to one."""
        first = max(1, min(parts, round(self.small / SHORT)))
        return [(first, -(-self.offspring // 3)), (round((first * parts) ** 0.5), 1), (parts, 1)]

    def _chosen(self, halves: Halves) -> EvoPress:
        attn, mlp = (tuple(sorted(half)) for half in halves)
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


@contextmanager
def _quick_products() -> Iterator[None]:
    """Torch may multiply floats by its quickest kernels, whose rounding is below what candidates differ by."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def leave_out(program: Program, halves: Halves) -> None:
    """Leave halves out of every entry. Raises BadInput for one that is not there."""
    there = program.layers
    for half, indices in zip(HALVES, halves, strict=True):
        for index in sorted(indices):
            if index not in there:
                raise BadInput(f"evopress: there is no layer {index} in {program.name}")
            there[index].bypass(half)


class Divergence:
    """KL(full, pruned) per token, averaged over some of the sequences; less is better. The full model runs once, and the `TOP`
    largest probabilities of each token are kept; what was found of a candidate is, too. The forward runs half by half: candidates
    that begin alike share the stream up to where they differ. ``influence``: of each half, and of whole layers (half ""), 1 - the
    mean cosine of the stream before and after it, on all sequences."""

    def __init__(self, program: Program, weights: Weights, sequences: list[torch.Tensor]) -> None:
        score = program.entries["score"]
        self._sequences, self._interpreter = sequences, Interpreter(program, weights)
        self._known: dict[tuple[Halves, int], float] = {}
        calls = blocks(score)
        self._halves = [(layer, HALVES.index(v.attr("label").partition(".")[2])) for layer, v in calls]
        streams = [*(v.args[0] for _, v in calls), stream_after(score)]
        ids = score.inputs[0]
        cuts = [(ids, streams[0]), *zip(streams, streams[1:], strict=False), (streams[-1], score.outputs[0])]
        self._pieces = [cut(program, score, f"piece_{i}", x, (y,), (), "evopress") for i, (x, y) in enumerate(cuts)]
        self._full = []
        self.influence = dict.fromkeys([(i, half) for i in program.layers for half in (*HALVES, "")], 0.0)
        for i in range(len(sequences)):
            known = self._streams((frozenset(), frozenset()), [i], [])
            self._count(known, len(sequences))
            logits = self._logits(known[-1], [i])
            top = logits.topk(min(TOP, logits.shape[-1]))
            self._full.append((top.values - logits.logsumexp(-1, keepdim=True), top.indices))

    def __call__(self, candidates: Sequence[Halves], parts: Sequence[int]) -> list[float]:
        for begin in range(0, len(parts), TOGETHER):
            batch = parts[begin : begin + TOGETHER]
            self._measure([c for c in candidates if any((c, i) not in self._known for i in batch)], batch)
        return [sum(self._known[c, i] for i in parts) / len(parts) for c in candidates]

    def _measure(self, candidates: Sequence[Halves], batch: Sequence[int]) -> None:
        known: list[torch.Tensor] = []
        before: list[bool] = []
        for kept, candidate in sorted(((self._kept(c), c) for c in candidates), key=lambda pair: pair[0]):
            alike = next((n for n, (a, b) in enumerate(zip(before, kept, strict=False)) if a != b), len(before))
            before, known = kept, self._streams(candidate, batch, known[: alike + 1])
            parts = torch.split(self._logits(known[-1], batch), [len(self._sequences[i]) for i in batch])
            for i, logits in zip(batch, parts, strict=True):
                full, index = self._full[i]
                got = logits.gather(-1, index) - logits.logsumexp(-1, keepdim=True)
                self._known[candidate, i] = float((full.exp() * (full - got)).sum(-1).mean())

    def ranked(self, half: str) -> list[int]:
        """The layers in order of the influence of that half."""
        return [layer for (layer, at), _ in sorted(self.influence.items(), key=lambda found: found[1]) if at == half]

    def _count(self, streams: list[torch.Tensor], of: int) -> None:
        """Add the influence of one of so many sequences."""
        first = {layer: h for (layer, _), h in zip(reversed(self._halves), reversed(streams[:-1]), strict=True)}
        last = {layer: h for (layer, _), h in zip(self._halves, streams[1:], strict=True)}
        pairs = {(layer, HALVES[half]): streams[i : i + 2] for i, (layer, half) in enumerate(self._halves)}
        pairs |= {(layer, ""): [first[layer], last[layer]] for layer in first}
        for key, (before, after) in pairs.items():
            cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            self.influence[key] += float(1 - cosine.mean()) / of

    def _kept(self, candidate: Halves) -> list[bool]:
        return [layer not in candidate[half] for layer, half in self._halves]

    def _streams(self, candidate: Halves, batch: Sequence[int], known: list[torch.Tensor]) -> list[torch.Tensor]:
        """The stream before every half and after the last; ``known``: the first of them."""
        found = known or [self._run(0, torch.cat([self._sequences[i] for i in batch]), batch)]
        for i, kept in list(enumerate(self._kept(candidate), 1))[len(found) - 1 :]:
            found.append(self._run(i, found[-1], batch) if kept else found[-1])
        return found

    def _logits(self, h: torch.Tensor, batch: Sequence[int]) -> torch.Tensor:
        return self._run(-1, h, batch).float()

    def _run(self, piece: int, x: torch.Tensor, batch: Sequence[int]) -> torch.Tensor:
        graph = self._pieces[piece]
        axis = graph.inputs[0].tensor.tokens
        assert axis is not None
        at = Tokens.chunk([len(self._sequences[i]) for i in batch], [0] * len(batch))
        with torch.inference_mode():
            found: torch.Tensor = self._interpreter.run(graph, {graph.names[graph.inputs[0]]: x}, {axis.name: at})[0]
        return found


def _draw(layers: Sequence[int], count: int, random: Random) -> Halves:
    return frozenset(random.sample(layers, count)), frozenset(random.sample(layers, count))


def _mutated(parent: Halves, order: Sequence[Sequence[int]], random: Random) -> Halves:
    """One to three swaps, few more often than many, each of one half that is left out with one that is not, or of both halves of
    two layers. ``order``: the layers by the influence of their halves; those with little are left out more often."""
    halves = [set(half) for half in parent]
    for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
        chosen = (0, 1) if random.random() < 0.5 else (random.randrange(2),)
        here = order[chosen[0]]
        outs = [n for n in here if all(n not in halves[i] for i in chosen)]
        backs = [n for n in reversed(here) if all(n in halves[i] for i in chosen)]
        if outs and backs:
            out, back = (random.choices(found, [1 / (1 + i) for i in range(len(found))])[0] for found in (outs, backs))
            for i in chosen:
                halves[i].symmetric_difference_update((out, back))
    return frozenset(halves[0]), frozenset(halves[1])
