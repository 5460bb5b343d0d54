"""An elitist evolutionary search with several stages of selection (EvoPress, Sieberling et al. 2024, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

Candidate = TypeVar("Candidate")

#: The fitness of candidates (less is better) on a batch that is drawn anew for every call; the number says how large.
Fitness = Callable[[Sequence[Candidate], int], list[float]]


def evolve(
    start: Sequence[Candidate],
    mutate: Callable[[Candidate, Random], Candidate],
    fitness: Fitness[Candidate],
    *,
    generations: int,
    offspring: int,
    stages: Sequence[tuple[int, int]],
    random: Random,
    report: Callable[[int, Candidate, float], None] = lambda generation, best, loss: None,
) -> Candidate:
    """The best candidate after ``generations``. ``stages``: (size of the batch, candidates that survive it), the last of which
    keeps one; the parent joins before the last stage, and is measured on the same batch as its children."""
    *early, (size, _) = stages
    losses = fitness(start, size)
    best, loss = min(zip(start, losses, strict=True), key=lambda found: found[1])
    report(0, best, loss)
    for generation in range(1, generations + 1):
        children: list[Candidate] = []
        for _ in range(8 * offspring):  # distinct ones, of which a small space may have fewer
            child = mutate(best, random)
            if len(children) < offspring and child != best and child not in children:
                children.append(child)
        for small, count in early:
            order = sorted(zip(fitness(children, small), range(len(children)), strict=True))
            children = [children[i] for _, i in order[:count]]
        final = [best, *children]
        losses = fitness(final, size)
        best, loss = min(zip(final, losses, strict=True), key=lambda found: found[1])
        report(generation, best, loss)
    return best
