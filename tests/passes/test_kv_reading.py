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


def rotated(text: list[int], layers: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[4, n, 8]`` and keys ``[2, n, 8]`` of the first layer, by transformers."""
    model, seen = llama(layers), {}
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


def decoded(seen_by: Any, layers: int = 1) -> torch.Tensor:
    """Token by token, by transformers alone: in the last layer, whose keys do not depend on what it attends to, tokens see
    ``seen_by(text) [4, n, n]`` of what comes before them."""
    text, model = prompt()[0].tolist(), llama(layers)
    while len(text) < PROMPT + NEW:
        seen = seen_by(text) & torch.ones(len(text), len(text)).tril().bool()
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None]

        def masked(module: Any, args: Any, kwargs: Any, mask: torch.Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        hook = model.model.layers[-1].register_forward_pre_hook(masked, with_kwargs=True)
        with torch.no_grad():
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        hook.remove()
    return torch.tensor([text])


def last_row(seen: torch.Tensor) -> torch.Tensor:
    """What the last token sees, ``[4, n]``; all others see everything (so does the last one of the prompt)."""
    n = seen.shape[1]
    found = torch.ones(4, n, n, dtype=torch.bool)
    if n > PROMPT:
        found[:, -1] = seen
    return found


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
    return last_row(seen)


def tidal_sees(text: list[int], budget: int = 9) -> torch.Tensor:
    """Of TidalDecode (2024): the tokens with the largest products in the first layer, of a key head the same ones."""
    q, k = rotated(text, 2)
    n, seen = len(text), torch.zeros(4, len(text), dtype=torch.bool)
    before = (n - 1) // 16 * 16
    seen[:, before:] = True
    for h in range(2):
        product = (q[2 * h : 2 * h + 2, -1] @ k[h, :before].T).amax(0)
        for j in product.topk(budget).indices.tolist():
            seen[2 * h : 2 * h + 2, j] = True
    return last_row(seen)


def duo_sees(text: list[int]) -> torch.Tensor:
    """Of DuoAttention (2024), whose second key head retrieves."""
    i = torch.arange(len(text))
    few = (i[:, None] - i < 20) | (i < 3)
    return torch.stack((few, few, torch.ones_like(few), torch.ones_like(few)))


def test_tidal_decode_reads_what_the_layer_before_chose() -> None:
    want = decoded(tidal_sees, 2)
    assert torch.equal(generated(compiled("tidal-decode:budget=9,layers=0", layers=2), prompt()), want)
    assert not torch.equal(generated(compiled(layers=2), prompt()), want)


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_duo_attention_is_a_mask_of_some_heads_and_less_memory(target: str) -> None:
    want, model = decoded(duo_sees), compiled("duo-attention:heads=1,sinks=3,window=20", target=target)
    assert torch.equal(generated(model, prompt()), want)
    assert not torch.equal(generated(compiled(), prompt()), want)
    full, few = model.program.states.values()
    assert isinstance(full, KV) and isinstance(few, KV) and (full.heads, few.heads) == (1, 1)
    rows = {t: nbytes(t, 1, PROMPT + NEW, PROMPT) - index(t) for t in (full, few)}
    assert rows[full] == 2 * 8 * 4 * 112 and rows[few] == 2 * 8 * 4 * 48  # whole blocks of 110, and of 3 + 20 + 16
    assert model.stats is not None and model.stats.state_bytes == sum(rows.values()) + index(full) + index(few)


def index(type: KV) -> int:
    from elision.ir.layout import index_spec, segment_specs, spec_bytes

    scratch = segment_specs(type, type.segments[-1], 1, PROMPT + NEW)
    return spec_bytes(index_spec(type, 1, PROMPT + NEW, PROMPT)) + sum(map(spec_bytes, scratch))


def test_all_heads_streaming_is_streaming_llm() -> None:
    passes = ("duo-attention:sparsity=1,sinks=3,window=20", "streaming-llm:sinks=3,window=20")
    duo, streaming = (generated(compiled(p, layers=2), prompt(2)) for p in passes)
    assert torch.equal(duo, streaming)
    assert torch.equal(generated(compiled("duo-attention:sparsity=0"), prompt()), generated(compiled(), prompt()))


def test_heads_that_lose_nothing_stream(caplog: pytest.LogCaptureFixture) -> None:
    """Of three layers with two key heads: those whose values are zero lose nothing by seeing less."""
    model = tiny(num_hidden_layers=3, initializer_range=0.25, max_position_embeddings=256)
    with torch.no_grad():
        for layer, head in ((0, 1), (1, 0), (2, 1)):
            model.model.layers[layer].self_attn.v_proj.weight[8 * head : 8 * head + 8] = 0
    ids = torch.randint(1, 64, (2, 400), generator=torch.Generator().manual_seed(0))
    found = elision.compile(
        model, passes=["duo-attention:sinks=4,window=24,tokens=512"], target="reference", calibration=ids
    ).program
    assert found.applied[-1] == "duo-attention:heads=0+3-4,sinks=4,window=24,tokens=512"
    assert sorted(found.states) == ["kv_0", "kv_0_few", "kv_1", "kv_1_few", "kv_2", "kv_2_few"]


def test_what_is_asked_for_is_out_of_sight() -> None:
    from elision.passes.kv.retrieval import SPAN, asking

    ids, begin = asking(torch.arange(1000), 16, 100)
    copies = ids[begin:].view(-1, SPAN)
    assert len(ids) == 1000 and len(copies) == 8 and torch.equal(ids[:begin], torch.arange(begin))
    assert int(copies.min()) >= 16 and all(begin + i * SPAN - int(c[0]) > 100 for i, c in enumerate(copies))


def test_a_layer_that_chooses_cannot_be_left_out_of_drafts() -> None:
    passes = ["tidal-decode:layers=1,budget=20", "layer-skip-draft:layers=1"]
    with pytest.raises(BadInput, match="gives what later ones read"):
        elision.compile(llama(3), passes=passes, target="reference")


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
        "tidal-decode:budget=0": "budget=0; expected at least 1",
        "tidal-decode:layers=4": "layer 4 cannot choose; give layers= some that attend to all tokens before: 0",
        "tidal-decode:layers=0": "no layer comes after layer 0",
        "duo-attention:heads=2": "no head 2; expected some of 0 to 1",
        "duo-attention:sparsity=1.5": "sparsity=1.5",
        "duo-attention:window=0": "window=0",
        "duo-attention:sinks=-1,heads=0": "sinks=-1",
        "duo-attention": "has 160 positions, too few",
    }.items():
        with pytest.raises(BadInput, match=why):
            elision.compile(llama(), passes=[text], target="reference")
    quest, duo, tidal = "quest:dense=0", "duo-attention:heads=0", "tidal-decode:layers=0"
    for both in ((quest, "h2o"), ("h2o", quest), (quest, quest), (quest, duo), (tidal, "h2o"), (tidal, quest), (quest, tidal),
                 (tidal, duo), ("snapkv", duo), (duo, "snapkv"), (duo, "streaming-llm")):  # fmt: skip
        with pytest.raises(BadInput, match="compressed by another pass|attends by the mask"):
            elision.compile(llama(2), passes=[*both], target="reference")


def test_layers_with_a_window_stay_as_they_are_and_encoders_have_nothing_to_read() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, sliding_window=16,
    )  # fmt: skip
    windows = MistralForCausalLM(config).eval()
    for text in ("quest", "duo-attention:heads=0", "tidal-decode:layers=0"):
        with pytest.raises(BadInput, match=r"no attention to all tokens before; its masks are window\(16\)"):
            elision.compile(windows, passes=[text], target="reference")
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(BadInput, match="has no cache that decoding reads"):
        elision.compile(BertModel(BertConfig(**sizes)).eval(), passes=["quest"], target="reference")


def test_quest_of_the_heads_that_retrieve() -> None:
    """DuoAttention first: what is left of the whole caches can be read in part."""
    passes = ("duo-attention:heads=1+2,sinks=3,window=20", "quest:budget=48,dense=0")
    native, reference = (compiled(*passes, layers=2, target=target) for target in ("cpu", "reference"))
    assert torch.equal(generated(native, prompt(2)), generated(reference, prompt(2)))
    assert {n: t.summary is not None for n, t in native.program.states.items() if isinstance(t, KV)} == {
        "kv_0": True, "kv_1": True, "kv_0_few": False, "kv_1_few": False,
    }  # fmt: skip
