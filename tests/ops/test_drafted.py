"""Sampled rules on rows of a batch, from logits: what they are given, warps along ancestors, and what they refuse."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elision.errors import BadInput
from elision.ir.drafted import Drafted, Trees
from elision.ir.noise import RowKey
from elision.ir.parser import parse_graph
from elision.ir.printer import print_graph
from elision.ir.rejection import SAMPLED
from elision.ir.requests import Requests
from elision.ir.tokens import Tokens
from elision.ir.tree import Tree, pack
from elision.ir.types import Axis, Host
from elision.ir.value import Builder
from elision.ir.verify import RULES, Request, draw, verify
from elision.ir.warp import Warp
from tests.ops.harness import f32, i64, refused, run

VOCAB = 6
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(8)) * 1.5
LIKELIEST = TABLE.argmax(-1, keepdim=True)
DRAFTER = (TABLE + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(9))).softmax(-1)
KINDS = {"chain": ("iid", "wor", "point"), "recursive": ("iid", "wor", "point"), "k-seq": ("iid",), "block": ("iid", "point")}
B, D = Axis("b"), Axis("d", draft=True)

cases = st.sampled_from([(rule, kind) for rule, kinds in KINDS.items() for kind in kinds])
prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4)


def draft(rng: random.Random, rule: str, root: int) -> tuple[torch.Tensor, Tree]:
    """A random tree on ``root`` that the rule can verify, siblings all different."""
    chain = rule in ("chain", "block")
    parent, tokens, tree = [-1], [root], Tree((-1,))
    for node in range(1, rng.randint(1, 9)):
        p = node - 1 if chain else rng.randrange(node)
        free = [t for t in range(VOCAB) if all((parent[i], tokens[i]) != (p, t) for i in range(node))]
        if free:
            parent.append(p)
            tokens.append(rng.choice(free))
        else:
            break
        tree = Tree(tuple(parent))
    return torch.tensor(tokens), tree


def told(kind: str, ids: torch.Tensor) -> Drafted:
    return Drafted(kind, None if kind == "point" else DRAFTER[ids])


@given(case=cases, rows=st.lists(prompts, min_size=1, max_size=3), seed=st.integers(0, 2**32))
def test_rows_of_a_batch_equal_the_rows_alone_and_the_rule_on_tables(
    case: tuple[str, str], rows: list[list[int]], seed: int
) -> None:
    (rule, kind), rng = case, random.Random(seed)
    drafts = [draft(rng, rule, prompt[-1]) for prompt in rows]
    items = [Request(Warp(temperature=0.8), False, seed, r, rule) for r in range(len(rows))]
    row, pos, parent, anc = pack([tree for _, tree in drafts], [len(p) - 1 for p in rows])
    ids, past = torch.cat([tokens for tokens, _ in drafts]), [torch.tensor(p) for p in rows]
    batch = Requests(items, past)
    paths, drawn = batch.verify(ids, TABLE[ids], LIKELIEST[ids], Tokens(row, pos, len(rows), parent, anc), told(kind, ids))
    for r, (own, tree) in enumerate(drafts):
        position = len(rows[r]) - 1
        alone = verify(own, tree.parent, position, TABLE[own], past[r], items[r], told(kind, own))
        assert alone == (paths[r], int(drawn[r]))

        def p(_: torch.Tensor, nodes: torch.Tensor, own: torch.Tensor = own) -> torch.Tensor:
            return (TABLE[own[nodes]] / 0.8).softmax(-1).double()

        key = RowKey(seed, r)
        trees = Trees(own[None], torch.tensor([tree.parent]), told(kind, own).part(None), p, [key], [position])
        node, token = SAMPLED[rule](trees)
        assert alone == (tree.path(int(node)), int(token))


@given(
    case=st.sampled_from([("chain", "iid"), ("recursive", "iid"), ("recursive", "wor"), ("block", "iid")]),
    prompt=prompts,
    seed=st.integers(0, 2**32),
)
def test_p_of_a_node_sees_its_own_ancestors(case: tuple[str, str], prompt: list[int], seed: int) -> None:
    """Where each q is the target's own warped distribution, the first children are all accepted, if the rule sees the same."""
    (rule, kind), params = case, Warp(repetition_penalty=1.9, temperature=0.7)
    ids, tree = draft(random.Random(seed), rule, prompt[-1])
    row, pos, parent, anc = pack([tree], [len(prompt) - 1])
    batch = Requests([Request(params, False, seed, 0, rule)], [torch.tensor(prompt)])
    at = Tokens(row, pos, 1, parent, anc)
    paths, _ = batch.verify(ids, TABLE[ids], LIKELIEST[ids], at, Drafted(kind, batch.warp(TABLE[ids], at, ids)))
    expected = [0]
    while children := [i for i, p in enumerate(tree.parent) if p == expected[-1]]:
        expected.append(children[0])
    assert paths[0] == expected


@given(prompt=prompts, rule=st.sampled_from(sorted(RULES)), seed=st.integers(0, 2**32))
def test_without_a_draft_all_rules_draw_the_same_token(prompt: list[int], rule: str, seed: int) -> None:
    past, logits, match = torch.tensor(prompt), TABLE[prompt[-1]], Request(greedy=False, seed=seed)
    if rule != "greedy":
        assert draw(logits, past, replace(match, rule=rule)) == draw(logits, past, match)
    assert draw(logits, past, Request(seed=seed)) == int(logits.argmax())


@pytest.mark.parametrize("rule", sorted(SAMPLED))
def test_a_greedy_request_is_greedy_by_any_rule(rule: str) -> None:
    best = [2]
    for _ in range(3):
        best.append(int(TABLE[best[-1]].argmax()))
    ids = torch.tensor(best[:3])
    assert verify(ids, (-1, 0, 1), 0, TABLE[ids], ids[:1], Request(rule=rule)) == ([0, 1, 2], best[3])


def test_what_rules_refuse() -> None:
    ids, bush, past = torch.tensor([0, 1, 2]), (-1, 0, 0), torch.tensor([0])

    def fails(message: str, rule: str, given: Drafted | None, parent: tuple[int, ...] = bush) -> None:
        with pytest.raises(BadInput, match=message):
            verify(ids, parent, 0, TABLE[ids], past, Request(greedy=False, rule=rule), given)

    for rule in SAMPLED:
        fails(f"rule {rule} needs the q that the drafts were drawn from", rule, None)
        fails(r"q is \[3, 5\], but the logits are \[3, 6\]", rule, Drafted("iid", DRAFTER[ids, :5]))
    for rule in ("chain", "block"):
        fails(f"rule {rule} verifies chains, and the draft branches", rule, told("iid", ids))
        twice = Drafted("iid", DRAFTER[ids], torch.tensor([1, 2, 1]))
        fails(f"rule {rule} verifies chains, and some nodes were drawn more than once", rule, twice, (-1, 0, 1))
    fails("2 siblings of kind wor; it tests i.i.d. draws only", "k-seq", told("wor", ids))
    fails("2 siblings of kind point", "k-seq", told("point", ids))
    q = DRAFTER[ids].clone()
    q[0, 1] = 0.0
    for rule in ("recursive", "k-seq"):
        fails("token 1 was drafted, but in q its probability is 0", rule, Drafted("iid", q))
    fails("token 1 was drafted, but in q its probability is 0", "block", Drafted("iid", q), (-1, 0, 1))
    with pytest.raises(BadInput, match="rule='greedy'; expected one of match, chain, recursive, k-seq, block"):
        Request(greedy=False, rule="greedy")
    with pytest.raises(BadInput, match="kind 'sampled'; expected one of point, iid, wor"):
        Drafted("sampled", q)
    with pytest.raises(BadInput, match="kind iid without q"):
        Drafted("iid")
    with pytest.raises(BadInput, match="kind point with q"):
        Drafted("point", q)
    with pytest.raises(BadInput, match="draws of kind wor"):
        Drafted("wor", q, torch.ones(3, dtype=torch.int64))


# The op.


@pytest.mark.parametrize(("kind", "drawn"), [("point", 0), ("wor", 1), ("iid", 1), ("iid", 2)])
def test_the_op_gives_its_operands_to_the_rule_and_is_read_back(kind: str, drawn: int) -> None:
    types = {"ids": i64(D), "logits": f32(D, VOCAB), "best": i64(D, 1), "requests": Host("requests"), "last": i64(B)}
    types |= dict([("q", f32(D, VOCAB)), ("draws", i64(D))][:drawn])
    b = Builder("g")
    graph = b.build(*b.add("verify", *(b.input(name, t) for name, t in types.items()), kind=kind))
    assert f"kind='{kind}'" in print_graph(graph) and parse_graph(print_graph(graph)).key() == graph.key()
    ids, tree = torch.tensor([0, 1, 2, 3]), Tree((-1, 0, 0, 1))
    found = set()
    for seed in range(60):
        row, pos, parent, anc = pack([tree], [0])
        at, item = Tokens(row, pos, 1, parent, anc), Request(greedy=False, seed=seed, rule="recursive")
        batch, draws = Requests([item], [ids[:1]]), torch.tensor([1, 2, 1, 1])
        inputs = {"ids": ids, "logits": TABLE[ids], "best": LIKELIEST[ids], "requests": batch, "last": ids[:1]}
        inputs |= {"q": DRAFTER[ids], "draws": draws}
        paths, token = run(graph, {name: inputs[name] for name in types}, {"d": at, "b": Tokens.chunk([1], [0])})
        given = Drafted(kind, *[DRAFTER[ids], draws][:drawn])
        assert (paths[0], int(token[0])) == verify(ids, tree.parent, 0, TABLE[ids], ids[:1], item, given)
        found.add((len(paths[0]), int(token[0])))
    assert len(found) > 5


def test_types_of_drawn_operands() -> None:
    base = (i64(D), f32(D, 9), i64(D, 1), Host("requests"), i64(B))
    refused("kind='any'; expected one of point, iid, wor", "verify", *base, f32(D, 9), kind="any")
    for kind, drawn in (("iid", ()), ("wor", ()), ("point", (f32(D, 9),)), (None, (f32(D, 9),)), ("wor", (f32(D, 9), i64(D)))):
        refused(f"{len(drawn)} operands on drafts of kind {kind}; point has none", "verify", *base, *drawn, kind=kind)
    refused(r"expected q like the logits, f32\[draft\(d\), 9\]", "verify", *base, f32(D, 8), kind="iid")
    refused(r"expected draws i64\[draft\(d\)\]", "verify", *base, f32(D, 9), f32(D), kind="iid")
    refused("expected one token axis", "verify", *base, f32(B, 9), kind="iid")
