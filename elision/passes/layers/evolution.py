"""An elitist evolutionary search with several stages of selection (EvoPress, Sieberling et al. 2024, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

Candidate = TypeVar("Candidate")

#: The mean loss of candidates (less is better) over some parts of a text, given by their numbers.
Losses = Callable[[Sequence[Candidate], Sequence[int]], list[float]]


def evolve(
    start: Sequence[Candidate],
    mutate: Callable[[Candidate, Random], Candidate],
    losses: Losses[Candidate],
    *,
    generations: int,
    offspring: int,
    stages: Sequence[tuple[int, int]],
    random: Random,
    report: Callable[[int, Candidate, float], None] = lambda generation, best, loss: None,
) -> Candidate:
    """The best candidate after ``generations``; the first of ``start`` is the first parent, the others its children.

    ``stages``: (parts, survivors), ever more parts and fewer survivors; the last is the whole text and one. A stage looks at the
    parts of the one before and at more of them, in an order drawn anew for every generation, and compares on these parts alone:
    who is not better than the parent leaves. So the parent is replaced by who is better on the whole text, and by nobody else.
    """
    best, *children = start
    whole = range(stages[-1][0])
    for generation in range(generations + 1):
        tried = 0
        while generation and len(children) < offspring and tried < 8 * offspring:  # a small space may have fewer
            child, tried = mutate(best, random), tried + 1
            if child != best and child not in children:
                children.append(child)
        order = random.sample(whole, len(whole))
        for parts, survivors in stages:
            mine, *theirs = losses([best, *children], order[:parts])
            ranked = sorted((loss, i) for i, loss in enumerate(theirs) if loss < mine)
            children = [children[i] for _, i in ranked[:survivors]]
        if children:
            best = children.pop()
        report(generation, best, losses([best], whole)[0])
    return best
