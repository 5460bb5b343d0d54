"""Methods that keep a whole cache and read a part of it: what they read, against transformers with the mask that this means."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import elision
from elision.errors import BadInput
from elision.ir.layout import nbytes
from elision.ir.ops.pages import pick
from elision.ir.states import KV, Dense, Float, Int, Scratch, Segment, Summary
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from tests.passes.small import tiny

PROMPT, NEW = 70, 40


@cache
def llama(layers: int = 1) -> Any:
    return tiny(num_hidden_layers=layers, initializer_range=0.25)


@cache
def compiled(*passes: str, layers: int = 1, target: str = "reference") -> elision.Model:
    return elision.compile(llama(layers), passes=[*passes], target=target)


def prompt(rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 64, (rows, PROMPT), generator=torch.Generator().manual_seed(3))


def generated(model: elision.Model, ids: torch.Tensor) -> torch.Tensor:
    found = model.generate(ids, max_new_tokens=NEW)
    assert isinstance(found, torch.Tensor)
    return found


def rotated(text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[4, n, 8]`` and keys ``[2, n, 8]`` of the first layer, by transformers."""
    model, seen = llama(), {}
    layer = model.model.layers[0].self_attn
    hooks = [getattr(layer, n).register_forward_hook(lambda m, a, out, n=n: seen.update({n: out})) for n in ("q_proj", "k_proj")]
    with torch.no_grad():
        model(torch.tensor([text]))
        q, k = (seen[n][0].view(len(text), -1, 8).transpose(0, 1)[None] for n in ("q_proj", "k_proj"))
        cos, sin = model.model.rotary_emb(q, torch.arange(len(text))[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    for hook in hooks:
        hook.remove()
    return q[0], k[0]


def decoded(seen_by: Any) -> torch.Tensor:
    """A one-layer model, token by token, by transformers alone: the last token attends to ``seen_by(text) [4, n]``."""
    text = prompt()[0].tolist()
    while len(text) < PROMPT + NEW:
        n = len(text)
        allowed = torch.ones(4, n, n).tril().bool()
        if n > PROMPT:
            allowed[:, -1] = seen_by(text)
        mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None]
        with torch.no_grad():
            text.append(int(llama()(torch.tensor([text]), attention_mask=mask).logits[0, -1].argmax()))
    return torch.tensor([text])


def quest_sees(text: list[int], budget: int = 48, page: int = 8) -> torch.Tensor:
    """Of Quest (2024): algorithm 1, by its definition."""
    q, k = rotated(text)
    n, seen = len(text), torch.zeros(4, len(text), dtype=torch.bool)
    whole = (n - 1) // page
    seen[:, whole * page :] = True
    for h in range(2):
        pages = k[h, : whole * page].view(whole, page, 8)
        high, low = pages.amax(1), pages.amin(1)
        bound = torch.stack([torch.maximum(x * high, x * low).sum(-1) for x in q[2 * h : 2 * h + 2, -1]]).amax(0)
        bound[0] = torch.inf
        for p in bound.topk(min(whole, budget // page - 1)).indices.tolist():
            seen[2 * h : 2 * h + 2, p * page : (p + 1) * page] = True
    return seen


def test_quest_reads_what_the_paper_says() -> None:
    want = decoded(quest_sees)
    assert torch.equal(generated(compiled("quest:budget=48,page=8,dense=0"), prompt()), want)
    assert not torch.equal(generated(compiled(), prompt()), want)


def filled(k: torch.Tensor, summary: int, encoding: Float | Int | None = None) -> KVStore:
    """A cache of two sequences with keys ``[n, 2, dim]`` and no values to speak of."""
    enc = encoding or Float()
    type = KV(2, k.shape[2], 8, (Segment(Dense(), enc, Float()), Segment(Scratch(4), enc, Float())))
    type = KV(**{**vars(type), "summary": Summary(summary) if summary else None})
    store = KVStore(type, 2, 128)
    store.append(Tokens.chunk([len(k), len(k)], [0, 0]), torch.cat((k, -k)), torch.zeros(2 * len(k), 2, 8))
    return store


@pytest.mark.parametrize("encoding", [Float(), Float("bf16"), Int(8, "channel", 6)])
def test_the_bound_of_a_page_is_never_below_its_products(encoding: Float | Int) -> None:
    from elision.ir.pages import _bounds, summarise

    generator = torch.Generator().manual_seed(0)
    k = torch.randn(101, 2, 6, generator=generator)
    store = filled(k, 5, encoding)
    summarise(store, torch.arange(2))
    assert store.index["summarised"].tolist() == [20, 20] and store.bytes() == nbytes(store.type, 2, 128)
    q = torch.randn(2, 7, 3, 6, generator=generator)
    for row in range(2):
        exact = (q @ store.entries("k", 100)[row].transpose(1, 2)[:, None]).unflatten(-1, (20, 5)).amax(-1)
        bound = _bounds(q, store, row, 20, 5)
        assert bool((bound >= exact - 1e-5).all()) and float((bound - exact).max()) > 0.1


def test_pages_are_summarised_once_whenever_they_are_complete() -> None:
    from elision.ir.pages import summarise

    k = torch.randn(100, 2, 6, generator=torch.Generator().manual_seed(0))
    whole, parts = filled(k, 4), filled(k[:0], 4)
    summarise(whole, torch.arange(2))
    for first in range(0, 100, 7):
        part = k[first : first + 7]
        parts.append(Tokens.chunk([len(part)] * 2, [first] * 2), torch.cat((part, -part)), torch.zeros(2 * len(part), 2, 8))
        summarise(parts, torch.arange(2))
    assert torch.equal(whole.index["summary"], parts.index["summary"])
    assert torch.equal(whole.index["summarised"], parts.index["summarised"])


def test_pages_of_one_entry_are_the_largest_products() -> None:
    k = torch.randn(100, 2, 6, generator=torch.Generator().manual_seed(0))
    q = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    at = Tokens(torch.arange(2), torch.tensor([100, 50]), 2)
    found = pick(q, filled(k, 0), n=9, page=1, open=1, room=128, at=at)
    for row, n in ((0, 100), (1, 50)):
        s = torch.einsum("hgd,khd->hgk", q[row].view(2, 2, 6), (1 - 2 * row) * k[:n]).amax(1)
        assert torch.equal(found[row], s.topk(9).indices.sort(-1).values)
    few = pick(q, filled(k, 0), n=9, page=16, open=16, room=128, at=Tokens(torch.arange(2), torch.tensor([40, 15]), 2))
    assert few[0].tolist() == [[0, 1, *[-1] * 7]] * 2 and few[1].tolist() == [[-1] * 9] * 2


def test_bad_input_is_told() -> None:
    for text, why in {
        "quest:budget=0": "budget=0; expected at least 1",
        "quest:page=0": "page=0",
        "quest:dense=-1": "dense=-1",
        "quest:dense=3": "among the first 3; lower dense",
    }.items():
        with pytest.raises(BadInput, match=why):
            elision.compile(llama(), passes=[text], target="reference")
    for both in (["quest:dense=0", "h2o"], ["h2o", "quest:dense=0"], ["quest:dense=0", "quest:dense=0"]):
        with pytest.raises(BadInput, match="compressed by another pass"):
            elision.compile(llama(), passes=both, target="reference")


def test_layers_with_a_window_stay_as_they_are_and_encoders_have_nothing_to_read() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, sliding_window=16,
    )  # fmt: skip
    with pytest.raises(BadInput, match=r"no attention to all tokens before; its masks are window\(16\)"):
        elision.compile(MistralForCausalLM(config).eval(), passes=["quest"], target="reference")
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(BadInput, match="has no cache that decoding reads"):
        elision.compile(BertModel(BertConfig(**sizes)).eval(), passes=["quest"], target="reference")
