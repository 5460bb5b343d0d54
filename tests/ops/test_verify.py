"""The rules on token trees give what decoding one by one gives, and draw from the exact distribution."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from elision.ir.drafted import VERIFY
from elision.ir.noise import RowKey, gumbel_rows
from elision.ir.requests import Requests
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.ir.verify import Request, draw, verify
from elision.ir.warp import Warp, penalise, warp

VOCAB = 7
#: An order-1 Markov model: logits of the next token, by the last one. Halves, so that greedy meets ties.
TABLE = (torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) * 4).round() / 2

warps = st.sampled_from(
    [
        Warp(),
        Warp(temperature=0.4, top_k=4),
        Warp(temperature=2.0, top_p=0.8, min_p=0.05),
        Warp(repetition_penalty=1.7),
        Warp(temperature=1.5, repetition_penalty=0.6, suppress=(2,)),
        Warp(repetition_penalty=1.3, suppress=(1, 2), suppress_before=7),
    ]
)
requests = st.builds(
    Request, warp=warps, greedy=st.booleans(), seed=st.integers(0, 2**40), row=st.integers(0, 5)
)
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)


def sequential(prompt: list[int], request: Request, new: int) -> list[int]:
    """Decoding one by one, written out: whole history, warp, and noise of the drawn token's position."""
    tokens = list(prompt)
    for _ in range(new):
        logits, past = TABLE[tokens[-1]][None], [torch.tensor(tokens)]
        if request.greedy:
            scores = penalise(logits, past, request.warp)[0].tolist()
            tokens.append(scores.index(max(scores)))
        else:
            key = RowKey(request.seed, request.row)
            noise = gumbel_rows([key], [len(tokens)], VERIFY, VOCAB)
            tokens.append(int((warp(logits, past, request.warp).double().log() + noise).argmax()))
    return tokens


def draft(rng: random.Random, prompt: list[int], truth: list[int]) -> tuple[list[int], Tree]:
    """A random tree on the last token of ``prompt``; many nodes hold what decoding will really give."""
    tokens, parent, tree = [prompt[-1]], [-1], Tree((-1,))
    for node in range(1, rng.randint(1, 12)):
        parent.append(rng.randrange(max(0, node - 3), node))
        tree = Tree(tuple(parent))
        place = len(prompt) + tree.depth[-1] - 1
        tokens.append(truth[place] if rng.random() < 0.7 else rng.randrange(VOCAB))
    return tokens, tree


@given(prompt=prompts, request_=requests, seed=st.integers(0, 2**32))
def test_speculation_on_random_trees_equals_decoding_one_by_one(
    prompt: list[int], request_: Request, seed: int
) -> None:
    rng = random.Random(seed)
    truth = sequential(prompt, request_, 30)
    done = list(prompt)
    while len(done) < len(prompt) + 15:
        tokens, tree = draft(rng, done, truth)
        ids = torch.tensor(tokens)
        path, token = verify(ids, tree.parent, len(done) - 1, TABLE[ids], torch.tensor(done), request_)
        assert path[0] == 0 and all(tree.parent[b] == a for a, b in zip(path, path[1:], strict=False))
        done += [*ids[path[1:]].tolist(), token]
        assert done == truth[: len(done)]


@given(prompt=prompts, request_=requests, length=st.integers(1, 10))
def test_a_draft_of_the_truth_is_accepted_whole(prompt: list[int], request_: Request, length: int) -> None:
    truth = sequential(prompt, request_, length + 1)
    ids = torch.tensor(truth[len(prompt) - 1 : -1])
    chain = range(-1, length)
    found = verify(ids, chain, len(prompt) - 1, TABLE[ids], torch.tensor(prompt), request_)
    assert found == (list(range(length + 1)), truth[-1])


@given(st.lists(st.tuples(prompts, requests), min_size=1, max_size=4), st.integers(0, 2**32))
def test_rows_of_a_batch_equal_the_rows_alone(rows: list[tuple[list[int], Request]], seed: int) -> None:
    rng = random.Random(seed)
    drafts = [draft(rng, prompt, sequential(prompt, q, 20)) for prompt, q in rows]
    row, pos, parent, anc = pack([tree for _, tree in drafts], [len(p) - 1 for p, _ in rows])
    ids = torch.tensor([token for tokens, _ in drafts for token in tokens])
    past = [torch.tensor(p) for p, _ in rows]
    batch = Requests([q for _, q in rows], past)
    paths, drawn = batch.verify(ids, TABLE[ids], TABLE[ids].argmax(-1, keepdim=True), Tokens(row, pos, len(rows), parent, anc))
    for r, ((tokens, tree), (prompt, q)) in enumerate(zip(drafts, rows, strict=True)):
        own = torch.tensor(tokens)
        alone = verify(own, tree.parent, len(prompt) - 1, TABLE[own], past[r], q)
        assert (paths[r], int(drawn[r])) == alone
    last = torch.tensor([prompt[-1] for prompt, _ in rows])
    assert batch.first(TABLE[last]) == [sequential(prompt, q, 1)[-1] for prompt, q in rows]


@given(prompt=prompts, request_=requests, seed=st.integers(0, 2**32))
def test_warped_probabilities_of_a_node_see_its_own_ancestors(
    prompt: list[int], request_: Request, seed: int
) -> None:
    tokens, tree = draft(random.Random(seed), prompt, sequential(prompt, request_, 20))
    row, pos, parent, anc = pack([tree], [len(prompt) - 1])
    ids = torch.tensor(tokens)
    batch = Requests([request_], [torch.tensor(prompt)])
    p = batch.warp(TABLE[ids], Tokens(row, pos, 1, parent, anc), ids)
    for node, token in enumerate(tokens):
        past = torch.tensor(prompt + ids[tree.path(node)[1:]].tolist())
        assert torch.equal(p[node], warp(TABLE[token][None], [past], request_.warp)[0])


def test_ties_go_to_the_lowest_id_and_equal_siblings_to_the_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    tokens, past = torch.tensor([0, 2, 1, 1]), torch.zeros(5, dtype=torch.int64)
    assert verify(tokens, (-1, 0, 0, 0), 4, logits, past, Request()) == ([0, 2], 0)


# The distribution. What is expected is computed here in plain Python, not with the code under test.

LOGITS = [1.2, -0.7, 2.1, 0.4, -1.5, 1.9]
HISTORY = [2, 4, 4]
RUNS = 4000


def softmax(x: list[float]) -> list[float]:
    e = [math.exp(v) for v in x]
    return [v / sum(e) for v in e]


def keep(p: list[float], kept: set[int]) -> list[float]:
    total = sum(p[i] for i in kept)
    return [v / total if i in kept else 0.0 for i, v in enumerate(p)]


def top(p: list[float], mass: float) -> set[int]:
    kept: set[int] = set()
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if sum(p[j] for j in kept) >= mass:
            break
        kept.add(i)
    return kept


PLAIN = softmax(LOGITS)
CASES = {
    "plain": (Warp(), PLAIN),
    "temperature": (Warp(temperature=0.6), softmax([v / 0.6 for v in LOGITS])),
    "top_k": (Warp(top_k=4), keep(PLAIN, {0, 2, 3, 5})),
    "top_p": (Warp(top_p=0.7), keep(PLAIN, top(PLAIN, 0.7))),
    "min_p": (Warp(min_p=0.2), keep(PLAIN, {i for i, v in enumerate(PLAIN) if v >= 0.2 * max(PLAIN)})),
    "repetition": (Warp(repetition_penalty=1.6), softmax([1.2, -0.7, 2.1 / 1.6, 0.4, -1.5 * 1.6, 1.9])),
    "suppress": (Warp(suppress=(5,)), keep(PLAIN, {0, 1, 2, 3, 4})),
}


def drawn(request: Request) -> np.ndarray:
    """How often each token is drawn, over ``RUNS`` rows that differ in their noise alone."""
    logits, past = torch.tensor(LOGITS), torch.tensor(HISTORY)
    tokens = [draw(logits, past, replace(request, row=r)) for r in range(RUNS)]
    return np.bincount(tokens, minlength=len(LOGITS))


def pvalue(counts: np.ndarray, p: list[float]) -> float:
    """Chi-square against ``p``; 0 if an impossible token was drawn."""
    possible = np.array(p) > 0
    if counts[~possible].sum():
        return 0.0
    return float(stats.chisquare(counts[possible], np.array(p)[possible] * counts.sum()).pvalue)


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution_and_no_other(name: str) -> None:
    params, p = CASES[name]
    counts = drawn(Request(params, greedy=False, seed=2024))
    assert pvalue(counts, p) > 1e-3
    for other, (_, q) in CASES.items():
        if other != name:  # unwarped or wrongly warped draws would be seen
            assert pvalue(counts, q) < 1e-4, other


@pytest.mark.parametrize("along", ["row", "position", "seed"])
def test_draws_are_independent_along(along: str) -> None:
    logits = torch.zeros(4)

    def token(i: int) -> int:
        past = torch.zeros(1 + (i if along == "position" else 0), dtype=torch.int64)
        request = Request(greedy=False, seed=i if along == "seed" else 8, row=i if along == "row" else 0)
        return draw(logits, past, request)

    tokens = [token(i) for i in range(1600)]
    table = np.zeros((4, 4))
    np.add.at(table, (tokens[:-1:2], tokens[1::2]), 1)
    assert stats.chisquare(table.flatten()).pvalue > 1e-4


def test_the_joint_of_a_speculated_row_is_the_product_of_the_model() -> None:
    """Three tokens, drawn in rounds over a tree that holds every first token and some second ones."""
    params = Warp(temperature=1.3, top_k=3, repetition_penalty=1.2)
    tokens = torch.tensor([0, *range(VOCAB), 1, 3, 5, 0])
    parent = (-1, *[0] * VOCAB, 1, 2, 4, 6)
    counts: dict[tuple[int, ...], int] = {}
    for r in range(RUNS):
        done, request = [0], Request(params, greedy=False, seed=77, row=r)
        while len(done) < 4:
            ids = tokens.clone()
            ids[0] = done[-1]
            path, token = verify(ids, parent, len(done) - 1, TABLE[ids], torch.tensor(done), request)
            done += [*ids[path[1:]].tolist(), token]
        key = tuple(done[1:4])
        counts[key] = counts.get(key, 0) + 1
    expected = joint(params)
    assert set(counts) <= set(expected)
    assert merged_pvalue(counts, expected) > 1e-3
    assert merged_pvalue(counts, joint(replace(params, repetition_penalty=1.0))) < 1e-4


def joint(params: Warp) -> dict[tuple[int, ...], float]:
    """Probability of every three tokens after token 0."""
    paths = {(0,): 1.0}
    for _ in range(3):
        steps = {k: warp(TABLE[k[-1]][None], [torch.tensor(k)], params)[0].tolist() for k in paths}
        paths = {(*k, t): v * p for k, v in paths.items() for t, p in enumerate(steps[k]) if p > 0}
    return {k[1:]: v for k, v in paths.items()}


def merged_pvalue(counts: dict[tuple[int, ...], int], p: dict[tuple[int, ...], float]) -> float:
    """Chi-square with all cells of an expectation below 5 as one."""
    big = [k for k, v in p.items() if v * RUNS >= 5]
    seen = np.array([counts.get(k, 0) for k in big] + [RUNS - sum(counts.get(k, 0) for k in big)])
    expected = np.array([p[k] for k in big] + [1 - sum(p[k] for k in big)]) * RUNS
    used = expected > 0
    return float(stats.chisquare(seen[used], expected[used] * seen[used].sum() / expected[used].sum()).pvalue)
