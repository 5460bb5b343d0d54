"""Methods that quantise all but the last tokens: against transformers with an attention that rounds what each query may not see
unrounded, and what they are given wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

import elision
from elision.errors import BadInput
from elision.ir.layout import nbytes
from elision.ir.requests import Requests
from elision.ir.states import KV
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.runtime.session import Session

CONTEXT, PROMPT, NEW, HEAD = 128, 45, 50, 16
Round = Callable[[torch.Tensor], torch.Tensor]


@cache
def llama(attention: str = "eager") -> Any:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=CONTEXT, initializer_range=0.25, pad_token_id=0, eos_token_id=2, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2)
    return model


@cache
def compiled(*passes: str, target: str = "reference") -> elision.Model:
    return elision.compile(llama(), passes=list(passes), target=target)


@cache
def ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(3, 96, (rows, PROMPT), generator=torch.Generator().manual_seed(3))


def generated(model: elision.Model, prompt: torch.Tensor, **more: Any) -> torch.Tensor:
    found = model.generate(prompt, max_new_tokens=NEW, eos_token_id=[], **more)
    assert isinstance(found, torch.Tensor)
    return found


@dataclass
class Forced(Requests):
    """Gives every sequence the tokens of ``text``, and keeps the logits."""

    text: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    logits: list[torch.Tensor] = field(default_factory=list)

    def verify(self, ids: torch.Tensor, logits: torch.Tensor, *rest: Any, **more: Any) -> Any:
        self.logits.append(logits.clone())
        return [[0]], self.text[0, PROMPT + len(self.logits)][None]


def logits(model: elision.Model, text: torch.Tensor) -> torch.Tensor:
    """After the prompt of ``text [1, n]`` and after every token that follows it but the last, read one by one."""
    session = Session(model._interpreter, 1, CONTEXT)
    requests = Forced([Request(Warp(), True, 0, 0)], list(text), [PROMPT], text=text)
    with torch.inference_mode():
        first = session.prefill([text[0, :PROMPT].tolist()])
        for i in range(PROMPT, text.shape[1] - 1):
            session.round({0: int(text[0, i])}, requests)
    return torch.cat((first, *requests.logits))


def uniform(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Rounded to ``2 ** bits`` even steps between the least and the largest number along ``dim``."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return low + step * torch.where(step > 0, ((x - low) / step).round(), 0)


def rounds(bits: int, block: int) -> tuple[Round, Round]:
    """Of KIVI: keys ``[heads, n, D]`` by channel, ``block`` tokens at a time; values by token, ``block`` channels at a time."""
    return (
        lambda k: uniform(k.unflatten(1, (-1, block)), bits, 2).flatten(1, 2),
        lambda v: uniform(v.unflatten(2, (-1, block)), bits, 3).flatten(2, 3),
    )


def oracle(block: int, residual: int, keys: Round, values: Round, text: torch.Tensor) -> torch.Tensor:
    """Logits of transformers on the whole text; the query at position t sees what was moved to blocks before it came, rounded."""

    def attention(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        groups = q.shape[1] // k.shape[1]
        out = torch.empty_like(q)
        for t in range(q.shape[2]):
            clock = max(PROMPT, t // block * block)
            n = 0 if t < PROMPT else max(0, (clock - residual) // block * block)
            key, value = (
                torch.cat((rounded(x[0, :, :n]), x[0, :, n : t + 1]), 1).repeat_interleave(groups, 0)
                for rounded, x in ((keys, k), (values, v))
            )
            p = (q[0, :, t, None] @ key.transpose(1, 2) * scaling).softmax(-1)
            out[0, :, t] = (p @ value)[:, 0]
        return out.transpose(1, 2), None

    AttentionInterface.register("rounded", attention)
    with torch.no_grad():
        return llama("rounded")(text).logits[0, PROMPT - 1 : -1]  # type: ignore[no-any-return]


def with_outliers(bits: int, block: int, count: int) -> tuple[Round, Round]:
    """Of GEAR without its matrix, for blocks as long as a row: ``count`` numbers at each end of a vector are kept."""

    def rounded(x: torch.Tensor, along: int) -> torch.Tensor:
        blocks = x.unflatten(1, (-1, block))  # [heads, blocks, n, D]
        low, high = (sign * (sign * blocks).kthvalue(count, along, True).values for sign in (1, -1))
        outlier = (blocks <= low) | (blocks >= high)
        dense = torch.where(outlier, blocks.mean(along, keepdim=True), blocks)
        return torch.where(outlier, blocks.half().float(), uniform(dense, bits, along)).flatten(1, 2)

    return lambda k: rounded(k, 2), lambda v: rounded(v, 3)


SETTINGS = {
    "kivi:bits=2,group=16,residual=16": (16, 16, *rounds(2, 16)),
    "kivi:bits=4,group=16,residual=0": (16, 0, *rounds(4, 16)),
    "kivi:bits=2,group=8,residual=24": (8, 24, *rounds(2, 8)),
    "gear:bits=2,block=16,rank=0": (16, 0, *with_outliers(2, 16, 1)),
    "gear:bits=4,block=16,rank=0,outliers=2,residual=16": (16, 16, *with_outliers(4, 16, 2)),
}


@pytest.mark.parametrize("text", SETTINGS)
def test_what_is_rounded_is_what_the_method_says(text: str) -> None:
    whole = generated(compiled(text), ids())
    want = oracle(*SETTINGS[text], whole)
    torch.testing.assert_close(logits(compiled(text), whole), want, rtol=1e-3, atol=1e-3)
    unrounded = oracle(1, CONTEXT, *rounds(2, 16), whole)
    assert float((want - unrounded).abs().max()) > 0.05


def test_a_matrix_of_full_rank_repairs_it_all() -> None:
    """Up to its float16; a smaller one repairs less (what it is: `tests/ir/test_encoding.py`)."""
    whole = generated(compiled(), ids())
    want = logits(compiled(), whole)
    error = [float((logits(compiled(f"gear:bits=2,block=16,rank={r}"), whole) - want).square().mean().sqrt()) for r in (0, 4, 16)]
    assert error == sorted(error, reverse=True) and error[2] < 0.01 < 0.1 < error[0], error


@pytest.mark.parametrize("text", ["kivi:group=16,residual=128", "gear:block=16,residual=128"])
def test_a_tail_of_the_whole_context_changes_nothing(text: str) -> None:
    for target, close in (("reference", 0.0), ("cpu", 1e-4)):
        a, b = compiled(text, target=target), compiled(target=target)
        assert torch.equal(generated(a, ids(3)), generated(b, ids(3)))
        whole = generated(b, ids())
        torch.testing.assert_close(logits(a, whole), logits(b, whole), rtol=close, atol=close)


@pytest.mark.parametrize("text", SETTINGS)
def test_a_batch_of_different_lengths(text: str) -> None:
    """Every sequence of a batch is flushed by its own clock: tokens are those that it has alone."""
    lengths, pad = (PROMPT, 17, 1, 32), torch.zeros(4, PROMPT, dtype=torch.int64)
    mask = torch.zeros_like(pad)
    for r, n in enumerate(lengths):
        pad[r, PROMPT - n :], mask[r, PROMPT - n :] = ids(4)[r, :n], 1
    for target in ("reference", "cpu"):
        model = compiled(text, target=target)
        together = generated(model, pad, attention_mask=mask)
        for r, n in enumerate(lengths):
            assert torch.equal(together[r, PROMPT:], generated(model, ids(4)[r : r + 1, :n])[0, n:])


def test_bytes_are_those_of_the_card() -> None:
    """Codes, a scale and a minimum for a group, and the tail; no more is allocated."""
    bits, group, residual = 2, 16, 32
    model = compiled(f"kivi:bits={bits},group={group},residual={residual}")
    generated(model, ids(2))
    types = list(model.program.states.values())
    assert model.stats is not None and model.stats.state_bytes == sum(nbytes(t, 2, PROMPT + NEW, PROMPT) for t in types)
    room = -(-(PROMPT + NEW) // 16) * 16  # whole blocks of 16 slots
    session = Session(model._interpreter, 2, PROMPT + NEW)
    with torch.inference_mode():
        session.prefill(ids(2).tolist())
    for store in session._stores.values():
        assert isinstance(store.type, KV)
        coded, tail, _ = store.segments
        for what, scales in (("k", (PROMPT + NEW) // group * HEAD), ("v", room * HEAD // group)):
            sizes = {name: a.nbytes for name, a in coded.planes[what].arrays.items()}
            assert sizes == {"codes": 2 * 2 * room * HEAD * bits // 8, "scale": 2 * 2 * scales * 4, "low": 2 * 2 * scales * 4}
        assert tail.slots == residual + group and tail.nbytes() == 2 * 2 * 2 * tail.slots * HEAD * 4
        assert store.len["k"].tolist() == store.len["v"].tolist() == [[[0], [0]], [[PROMPT], [PROMPT]]]


def test_bad_input_is_told() -> None:
    for text, why in {
        "kivi:bits=3": "bits=3; expected 2, 4 or 8",
        "kivi:group=0": "group=0; expected at least 1",
        "kivi:group=32,residual=40": "expected a multiple of 32 tokens",
        "kivi:residual=-32": "residual=-32",
        "kivi:group=12,residual=0": "not a multiple of the group 12",
        "gear:bits=16": "bits=16; expected 2, 4 or 8",
        "gear:block=300": "blocks of 1 to 256",
        "gear:rank=-1": "expected a rank of 0 to 64",
        "gear:block=16,outliers=8": "fewer than 16 outliers",
        "gear:residual=10": "expected a multiple of 64",
    }.items():
        with pytest.raises(BadInput, match=why):
            elision.compile(llama(), passes=[text], target="reference")


PAIRS = ["h2o kivi", "kivi h2o", "kv-quant kivi", "kivi kv-quant", "kivi kivi", "snapkv gear", "gear kivi"]


@pytest.mark.parametrize("passes", PAIRS)
def test_two_methods_on_one_cache_are_refused(passes: str) -> None:
    with pytest.raises(BadInput, match="compressed by another pass"):
        elision.compile(llama(), passes=passes.split(), target="reference")
