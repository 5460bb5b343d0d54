"""Trees of guesses and the drafters that make them, against slow ones written with dictionaries."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.drafting import continuations, lookup, recycling, trigrams
from elision.ir.drafting.drafter import DRAFTERS, make
from elision.ir.drafting.policy import SIZES, Policy
from elision.ir.drafting.proposal import Proposal, chain, merge
from elision.ir.drafting.rates import Rates
from elision.ir.tree import Tree, signed

Paths = dict[tuple[int, ...], float]


@st.composite
def trees(draw: st.DrawFn, last: int = 5) -> Proposal:
    """A tree in levels of up to 20 nodes over few tokens; siblings differ."""
    paths = {()}
    for _ in range(draw(st.integers(0, 19))):
        before = draw(st.sampled_from(sorted(paths)))
        paths.add((*before, draw(st.integers(0, 3))))
    return of_paths(sorted(paths, key=lambda p: (len(p), p)), last)


def of_paths(paths: list[tuple[int, ...]], last: int = 5) -> Proposal:
    place = {p: i for i, p in enumerate(paths)}
    columns = [
        [p[-1] if p else last for p in paths],
        [place[p[:-1]] if p else -1 for p in paths],
        [len(p) for p in paths],
        [sum(p) % 7 for p in paths],
    ]
    return Proposal(*(np.array(c, np.int64) for c in columns))


def paths_of(tree: Proposal) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for i in range(len(tree)):
        found.append((*found[tree.parent[i]], int(tree.token[i])) if i else ())
    return found


@given(trees(), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_trees(tree: Proposal, tokens: list[int]) -> None:
    shape, paths = Tree(tuple(tree.parent.tolist())), paths_of(tree)
    assert tree.depth.tolist() == shape.depth and tree.ancestors().tolist() == [signed(b) for b in shape.ancestors]
    edges = np.linspace(0.2, 0.9, len(tree))
    expected = [np.prod([edges[i] for i in shape.path(n) if i]) for n in range(len(tree))]
    assert np.allclose(tree.along(edges), expected)
    settled, right = tree.outcomes(np.array(tokens))
    for path, s, r in zip(paths, settled, right, strict=True):
        assert r == (len(path) <= len(tokens) and list(path) == tokens[: len(path)])
        assert s == (0 < len(path) <= len(tokens) and list(path[:-1]) == tokens[: len(path) - 1])
    kept = sorted({0, *(n for m in range(0, len(tree), 3) for n in shape.path(m))})
    assert paths_of(tree.keep(np.array(kept))) == [paths[i] for i in kept]


@given(st.lists(trees(), min_size=1, max_size=3))
def test_merged_trees_have_every_path_once(given: list[Proposal]) -> None:
    worths = [np.linspace(0.1, 0.8, len(t)) for t in given]
    tree, worth, sources = merge(given, worths)
    missed: Paths = defaultdict(lambda: 1.0)
    where: dict[tuple[int, ...], int] = defaultdict(int)
    for d, (t, w) in enumerate(zip(given, worths, strict=True)):
        for path, x in zip(paths_of(t), w, strict=True):
            missed[path] *= 1 - x
            where[path] |= 1 << d
    found = paths_of(tree)
    assert sorted(found) == sorted(missed) and tree.depth.tolist() == sorted(tree.depth.tolist())
    assert np.allclose(worth[1:], [1 - missed[p] for p in found[1:]])
    assert len(given) == 1 or sources[1:].tolist() == [where[p] for p in found[1:]]


HISTORIES = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@given(HISTORIES, st.integers(1, 5))
def test_prompt_lookup(history: list[int], depth: int) -> None:
    found = lookup.PromptLookup(8, match=3, length=4).propose(np.array(history), 0, depth)
    expected: list[int] = []
    for m in (3, 2, 1):
        ends = [i for i in range(m, len(history)) if history[i - m : i] == history[len(history) - m :]]
        if ends:
            expected = history[ends[-1] : ends[-1] + min(4, depth)]
            break
    assert (found.token[1:].tolist() if found is not None else []) == expected
    assert found is None or found.token[0] == history[-1]


@given(HISTORIES, HISTORIES, st.integers(0, 30), st.integers(1, 4))
def test_continuation_tries(history: list[int], earlier: list[int], prompt: int, depth: int) -> None:
    drafter = continuations.ContinuationTrie(8, match=2, branch=4, nodes=63, memory=128)
    drafter.finish(np.array(earlier), 0)
    found = drafter.propose(np.array(history), prompt, depth)
    best: Paths = {}
    for m in (2, 1):
        if len(history) <= m:
            continue
        counts: Paths = defaultdict(float)
        for text, own in ((history, True), ([*earlier, -1], False)):
            for i in range(m, len(text)):
                if text[i - m : i] == history[len(history) - m :]:
                    for stop in range(i + 1, min(i + depth, len(text)) + 1):
                        if -1 in text[i:stop]:
                            break
                        counts[tuple(text[i:stop])] += 1 - 1e-4 if own and i < prompt else 1e-4
        if len(counts) > len(best):
            best = counts
        if len(best) + 1 >= 4:
            break
    assert sorted(paths_of(found)[1:] if found is not None else []) == sorted(best)


def test_continuation_tries_keep_what_is_frequent() -> None:
    history = np.array([1, 2, 3] * 5 + [1, 2, 4] + [1, 2])
    found = continuations.ContinuationTrie(8, branch=3, nodes=2).propose(history, len(history), 3)
    assert found is not None and paths_of(found)[1:] == [(3,), (3, 1)]


@given(st.lists(st.tuples(st.integers(0, 7), st.permutations(range(8))), max_size=12), st.integers(0, 7), st.integers(1, 4))
def test_token_recycling(seen: list[tuple[int, list[int]]], last: int, depth: int) -> None:
    drafter = recycling.TokenRecycling(8, nodes=12, k=3, depth=4)
    known: dict[int, list[int]] = {}
    for start in range(0, len(seen), 3):
        part = seen[start : start + 3]
        drafter.see(np.array([t for t, _ in part]), np.array([b for _, b in part]))
        for token, best in reversed(part):  # of equal nodes the first counts
            known[token] = best[:3]
    found = drafter.propose(np.array([last]), 1, depth)
    shape, token = drafter.template, {0: last}
    for i in range(1, len(shape)):
        before = token.get(int(shape.parent[i]))
        if before in known and shape.depth[i] <= depth:
            token[i] = known[before][int(shape.kind[i]) % 3]  # type: ignore[index]
    assert (found.token.tolist() if found is not None else [last]) == list(token.values())


@given(st.lists(st.integers(0, 5), min_size=3, max_size=80))
def test_trigrams_learn_what_was_written(history: list[int]) -> None:
    drafter = trigrams.TriGrams(8, width=40, depth=1, slots=4096)
    drafter.advance(np.array(history), len(history))
    count = Counter(zip(history, history[1:], history[2:], strict=False))
    after = {c for (a, b, c), _ in count.items() if (a, b) == tuple(history[-2:])}
    found = drafter.propose(np.array(history), 0, 3)
    assert (set(found.token[1:].tolist()) if found is not None else set()) == after
    for (a, b, c), n in count.items():
        slot = drafter._find(np.array([a]), np.array([b]))[0]
        weight = drafter.weight[slot][drafter.token[slot] == c]
        assert weight == pytest.approx([min(0.04 * n, 3.0)], rel=1e-5)


def test_rates_come_to_what_is_true() -> None:
    generator, rates = np.random.default_rng(0), Rates(np.array([0.5, 0.9]))
    for _ in range(600):
        guess = chain(0, np.array([1, 1]), np.array([0, 1]))
        rates.count(guess, np.array([int(generator.random() < 0.8), int(generator.random() < 0.2)]))
    assert rates.of(np.array([0, 1])) == pytest.approx([0.8, 0.2], abs=0.12)


@given(st.lists(st.floats(0.01, 0.99), max_size=40), st.integers(1, 3), st.floats(0.01, 1.0), st.floats(0, 0.5))
def test_the_policy_takes_the_number_of_nodes_that_is_fastest(
    chances: list[float], rows: int, slope: float, overhead: float
) -> None:
    policy = Policy(lambda: 1 + slope * (np.array(SIZES, float) - 1))
    policy.overhead = overhead
    chances = sorted(chances, reverse=True)
    found = policy.nodes(np.array(chances), rows)

    def rate(n: int) -> float:
        return (rows + sum(chances[:n])) / (1 + slope * (rows + n - 1) + (overhead if n else 0))

    most = max(map(rate, range(len(chances) + 1)))
    assert rate(found) == pytest.approx(most, rel=0.021) if found == 0 else rate(found) == pytest.approx(most)
    assert found == 0 or rate(found) > 1.019 * rate(0)


def test_drafters_by_name() -> None:
    assert {"prompt-lookup", "pain-trie", "token-recycling", "aded"} <= set(DRAFTERS)
    for name in DRAFTERS:
        drafter = make(name, 100)
        assert drafter.propose(np.array([3]), 1, 4) is None and drafter.nbytes() >= 0
    for wrong in ("oracle", "aded:wide=3", "aded:width=x"):
        with pytest.raises(BadInput, match="drafter"):
            make(wrong, 100)
