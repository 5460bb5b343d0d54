"""Methods that evict: against transformers with the mask that the method means, and what they are given wrongly."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import elision
from elision.errors import BadInput
from elision.ir.layout import LANES, nbytes
from elision.ir.states import KV
from elision.runtime.session import Session

CONTEXT, PROMPT, NEW, EVERY = 128, 70, 30, 8


@cache
def llama(layers: int = 2) -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.25, pad_token_id=0, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2)
    return model


@cache
def compiled(text: str, layers: int = 2, target: str = "reference") -> elision.Model:
    return elision.compile(llama(layers), passes=[text] if text else [], target=target)


@cache
def ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 96, (rows, PROMPT), generator=torch.Generator().manual_seed(3))


def generated(model: elision.Model, prompt: torch.Tensor) -> torch.Tensor:
    found = model.generate(prompt, max_new_tokens=NEW, eos_token_id=[])
    assert isinstance(found, torch.Tensor)
    return found


IDENTITY = ["streaming-llm:window=128", "h2o:budget=128", "a2sf:budget=128,alpha=.5", "keyformer:budget=128",
            "ems:budget=128", "snapkv:budget=128"]
TIGHT = [
    f"streaming-llm:window=20,sinks=3,every={EVERY}",
    f"h2o:budget=24,recent=6,sinks=2,every={EVERY}",
    f"a2sf:budget=24,recent=6,sinks=2,every={EVERY},alpha=0.8",
    "snapkv:budget=24,window=6,pool=3",
    f"keyformer:budget=24,recent=6,sinks=2,every={EVERY},steps={NEW},seed=5",
    f"ems:budget=24,window=6,every={EVERY},theta=0.2",
]


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("text", IDENTITY)
def test_a_budget_of_the_whole_context_changes_nothing(text: str, target: str) -> None:
    prompts = ids(3)
    assert torch.equal(generated(compiled(text, target=target), prompts), generated(compiled("", target=target), prompts))


@pytest.mark.parametrize("text", TIGHT)
def test_native_code_keeps_what_the_reference_keeps(text: str) -> None:
    prompts = ids(3)
    assert torch.equal(generated(compiled(text, target="cpu"), prompts), generated(compiled(text), prompts))


def test_streaming_is_a_mask_of_sinks_and_window() -> None:
    """Whatever the clock and the parts of the prompt: the logits are those of transformers with that mask."""
    sequence = generated(compiled(TIGHT[0]), ids())
    i = torch.arange(sequence.shape[1])
    seen = (i[None] <= i[:, None]) & ((i[:, None] - i[None] < 20) | (i[None] < 3))
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        best = llama()(sequence, attention_mask=mask).logits.argmax(-1)
    assert torch.equal(best[:, PROMPT - 1 : -1], sequence[:, PROMPT:])


def oracle(
    per_head: bool, decay: float, last: int, pool: int, budget: int, recent: int, sinks: int, every: int
) -> torch.Tensor:
    """A one-layer model that evicts, by transformers alone: every step runs the whole text, with a mask of what was still there
    when each token came, for each query head, and sums the probabilities that it gives."""
    model, text = llama(1), ids()[0].tolist()
    lists = torch.ones(2 if per_head else 1, CONTEXT, CONTEXT).tril().bool()
    while len(text) < PROMPT + NEW:
        n = len(text)
        seen = lists[:, :n, :n].repeat_interleave(4 // len(lists), 0)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None]
        with torch.no_grad():
            found = model(torch.tensor([text]), attention_mask=mask, output_attentions=True)
        if n == PROMPT or (every and n % every == 0):
            weight = decay ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
            if last:
                weight = weight * (torch.arange(n - 1, -1, -1) < last)
            received = (found.attentions[0][0].double() * weight[:, None]).sum(1)  # [query head, key]
            for here, score in zip(lists, received.view(len(lists), -1, n).sum(1), strict=True):
                there = here[n - 1, :n].clone()
                if pool > 1:
                    score = torch.cat((score[:-last], torch.zeros(last)))
                    score = torch.nn.functional.avg_pool1d(score[None, None], pool, 1, pool // 2)[0, 0]
                protect = (torch.arange(n) < sinks) | (torch.arange(n) >= n - recent)
                rank = torch.where(there, torch.where(protect, torch.inf, score), -torch.inf)
                best = torch.argsort(rank, descending=True, stable=True)[: min(budget, int(there.sum()))]
                kept = torch.zeros(n, dtype=torch.bool)
                kept[best] = True
                here[n:, :n] &= kept
        text.append(int(found.logits[0, -1].argmax()))
    return torch.tensor([text])


ORACLES = {
    TIGHT[1]: dict(decay=1.0, last=0, pool=1, budget=24, recent=6, sinks=2, every=EVERY),
    TIGHT[2]: dict(decay=0.8, last=0, pool=1, budget=24, recent=6, sinks=2, every=EVERY),
    TIGHT[3]: dict(decay=1.0, last=6, pool=3, budget=24, recent=6, sinks=0, every=0),
}


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("text", ORACLES)
def test_what_is_kept_is_what_the_method_says(text: str, per_head: bool) -> None:
    arguments: Any = ORACLES[text]
    want = oracle(per_head, **arguments)
    text += "" if per_head else ",per_head=false"
    assert torch.equal(generated(compiled(text, layers=1), ids()), want)


def test_no_forgetting_is_h2o() -> None:
    h2o, a2sf = (compiled(f"{name}:budget=20,recent=5,sinks=1{more}") for name, more in (("h2o", ""), ("a2sf", ",alpha=1")))
    assert torch.equal(generated(h2o, ids(2)), generated(a2sf, ids(2)))


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_no_noise_and_a_temperature_of_one_is_h2o(target: str) -> None:
    more = ":budget=20,recent=5,sinks=1"
    h2o = generated(compiled(f"h2o{more}", target=target), ids(2))
    plain, noisy = (compiled(f"keyformer{more},{x}", target=target) for x in ("noise=false,tau_end=1", "seed=1,tau_end=1"))
    assert torch.equal(generated(plain, ids(2)), h2o) and not torch.equal(generated(noisy, ids(2)), h2o)


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_merging_nothing_is_eviction(target: str) -> None:
    text = f"ems:budget=24,window=6,every={EVERY}"
    none, far, some = (generated(compiled(f"{text},{x}", target=target), ids(2)) for x in ("rho=0", "theta=1.1", "theta=0.2"))
    assert torch.equal(none, far) and not torch.equal(none, some)


def test_noise_is_of_the_request_not_of_its_place() -> None:
    model = compiled(TIGHT[4])
    together = generated(model, ids(3))
    for row in range(3):
        assert torch.equal(generated(model, ids(3)[row : row + 1])[0], together[row])


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize(("text", "slots"), [(TIGHT[0], 31), (TIGHT[1], 32), (TIGHT[2], 32), (TIGHT[3], 24 + NEW)])
def test_bytes_are_those_of_the_budget(text: str, slots: int, target: str) -> None:
    """What is allocated while decoding is what the type says, and that is the budget, whatever the prompt."""
    model = compiled(text, target=target)
    generated(model, ids(2))
    stats = model.stats
    assert stats is not None and stats.state_bytes < stats.prompt_state_bytes
    types = model.program.states
    assert stats.state_bytes == sum(nbytes(t, 2, PROMPT + NEW, PROMPT) for t in types.values())
    rows = {t.heads * (t.dim + t.vdim) * 4 for t in types.values() if isinstance(t, KV)}
    session = Session(model._interpreter, 1, PROMPT + NEW)
    with torch.inference_mode():
        session.prefill(ids().tolist())
    for store in session._stores.values():
        assert store.segments[0].slots == slots and int(store.totals().max()) <= slots
        used = sum(p.arrays["codes"].nbytes for p in store.segments[0].planes.values())
        assert used == -(-slots // LANES) * LANES * next(iter(rows))


def test_a_prompt_comes_in_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a prompt do not change what is kept, nor does the streaming cache hold more than a part beyond its budget."""
    whole = [generated(compiled(text), ids(2)) for text in TIGHT]
    prefill = Session.prefill
    monkeypatch.setattr(Session, "prefill", lambda self, prompts: prefill(self, prompts, 9))
    for text, want in zip(TIGHT, whole, strict=True):
        assert torch.equal(generated(compiled(text), ids(2)), want)


def test_bad_input_is_told() -> None:
    for text, why in {
        "h2o:budget=10,recent=8,sinks=4": "always kept, 12 tokens",
        "h2o:budget=-1": "budget=-1; expected at least 1",
        "h2o:every=0": "every=0",
        "a2sf:alpha=1.5": "at most 1",
        "a2sf:recent=-2": "recent=-2",
        "keyformer:tau=0.1": "temperatures of at least 0.5",
        "keyformer:steps=0": "steps >= 1",
        "ems:share=2": "share 0 to 1",
        "ems:budget=20": "always kept, 32 tokens",
        "snapkv:pool=4": "odd",
        "snapkv:budget=8": "always kept, 32 tokens",
        "streaming-llm:window=0": "window=0",
        "streaming-llm:sinks=-1": "sinks=-1",
    }.items():
        with pytest.raises(BadInput, match=why):
            elision.compile(llama(), passes=[text], target="reference")


def test_windows_of_the_model_and_two_methods_are_refused() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=CONTEXT, sliding_window=16,
    )  # fmt: skip
    with pytest.raises(BadInput, match="0.attn attends by the mask window"):
        elision.compile(MistralForCausalLM(config).eval(), passes=["h2o"], target="reference")
    with pytest.raises(BadInput, match="compressed by another pass"):
        elision.compile(llama(), passes=["h2o", "snapkv"], target="reference")


def test_a_model_without_a_cache_is_refused() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    for name in ("h2o", "keyformer", "ems", "snapkv", "streaming-llm"):
        with pytest.raises(BadInput, match="no cache that decoding reads"):
            elision.compile(BertModel(config).eval(), passes=[name], target="reference")


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_latent_attention_is_attention_over_its_heads(target: str) -> None:
    """MLA is raised to keys and values of every head, which are evicted as any: nothing of the latent form is refused."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, first_k_dense_replace=2, num_attention_heads=4,
        num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        max_position_embeddings=CONTEXT, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=16, initializer_range=0.25, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    whole, tight, plain = (
        generated(elision.compile(model, passes=passes, target=target), ids(2))
        for passes in (["h2o:budget=128"], ["h2o:budget=24,recent=6,sinks=2"], [])
    )
    assert torch.equal(whole, plain) and not torch.equal(tight, plain)
