"""Prefill and steps on a cache equal the model's own forward, recomputed from scratch, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.ir.interp import Interpreter, run_entry
from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.requests import Requests
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.ir.verify import Request
from tests.ir.programs import Weights, tiny_llama, tiny_scorer

MASKS = [Mask(), Mask("window", 4), Mask("chunk", 5)]


def stores(program: Program, rows: int, capacity: int = 40) -> dict[str, KVStore]:
    return {name: KVStore(type, rows, capacity, torch.float64, poison=1e3) for name, type in program.states.items()}  # type: ignore[arg-type]


def score(program: Program, weights: Weights, ids: list[int]) -> torch.Tensor:
    """Logits ``[n, vocab]`` of one sequence, without a cache."""
    found = run_entry(program, weights, "score", torch.tensor(ids), Tokens.chunk([len(ids)], [0]), {})
    assert isinstance(found, torch.Tensor)
    return found


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_inserting_the_cache_leaves_score_as_it_was(mask: Mask) -> None:
    plain, weights = tiny_scorer(mask=mask)
    cached, _ = tiny_llama(mask=mask)
    assert torch.equal(score(plain, weights, [1, 2, 3, 5, 8, 13, 21]), score(cached, weights, [1, 2, 3, 5, 8, 13, 21]))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_greedy_decoding_equals_score(mask: Mask) -> None:
    """A ragged batch: every round's token is the argmax of score over all tokens so far, and so are the logits of prefill."""
    program, weights = tiny_llama(mask=mask)
    interpreter, held = Interpreter(program, weights), stores(program, 2)
    texts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    at = Tokens.chunk([len(t) for t in texts], [0, 0])
    logits, *_ = interpreter.run(program.entries["prefill"], {"ids": torch.tensor(sum(texts, [])), **held}, {"t": at})
    close(logits, torch.stack([score(program, weights, t)[-1] for t in texts]))
    assert program.round is not None
    texts = [[*t, int(row.argmax())] for t, row in zip(texts, logits, strict=True)]
    for _ in range(8):
        requests = Requests([Request(), Request()], [torch.tensor(t) for t in texts])
        at = Tokens(torch.arange(2), torch.tensor([len(t) - 1 for t in texts]), 2)
        given_ids = {"last": torch.tensor([t[-1] for t in texts]), "requests": requests}
        tokens, *_ = interpreter.run(program.round, {**given_ids, **held}, {"b": at})
        for text, new in zip(texts, tokens, strict=True):
            assert new == [int(score(program, weights, text)[-1].argmax())]
            text.extend(new)


def test_prefill_in_chunks_equals_prefill_at_once() -> None:
    program, weights = tiny_llama()
    text, held = [3, 1, 4, 1, 5, 9, 2, 6], stores(program, 1)
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        at = Tokens.chunk([stop - start], [start])
        found = run_entry(program, weights, "prefill", torch.tensor(text[start:stop]), at, held)
        close(found[0], score(program, weights, text[:stop])[-1])


@given(st.integers(0, 10**6), st.sampled_from(MASKS))
def test_every_node_of_a_tree_equals_score_over_its_path(seed: int, mask: Mask) -> None:
    """Random trees in two rows over caches of different lengths; after committing a path, the next tree too."""
    rng = random.Random(seed)
    program, weights = tiny_llama(mask=mask)
    held = stores(program, 2)
    texts = [[rng.randrange(64) for _ in range(rng.randint(1, 6))] for _ in range(2)]
    run_entry(program, weights, "prefill", torch.tensor(sum(texts, [])), Tokens.chunk([len(t) for t in texts], [0, 0]), held)
    for _ in range(2):
        trees = [Tree((-1, *(rng.randrange(i) for i in range(1, rng.randint(1, 8))))) for _ in range(2)]
        row, pos, parent, anc = pack(trees, [len(t) for t in texts])
        ids = torch.tensor([rng.randrange(64) for _ in row])
        logits = run_entry(program, weights, "step", ids, Tokens(row, pos, 2, parent, anc), held)
        first = 0
        paths = []
        for text, tree in zip(texts, trees, strict=True):
            nodes = ids[first : first + len(tree.parent)].tolist()
            for node in range(len(nodes)):
                spelled = text + [nodes[i] for i in tree.path(node)]
                close(logits[first + node], score(program, weights, spelled)[-1])
            path = tree.path(rng.randrange(len(nodes)))
            paths.append(path)
            text.extend(nodes[i] for i in path)
            first += len(nodes)
        for store in held.values():
            store.commit(paths)
