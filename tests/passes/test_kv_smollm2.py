"""Compressed caches on a real model and at a long context: memory that is really given back, quality that falls with the budget,
and a fact that is found again."""

from __future__ import annotations

import functools
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import elision
from elision.passes.calibration import topics
from elision.runtime.session import Session
from tests.passes.small import tiny

pytestmark = pytest.mark.nightly
BUDGETS = (64, 128, 256, 448)
FACTS = (("green", "7319"), ("red", "2846"), ("yellow", "5072"), ("white", "9164"))


@functools.cache
def compiled(*passes: str) -> elision.Model:
    return elision.compile("smollm2", passes=["bf16", *passes], threads=2)


@functools.cache
def words() -> list[int]:
    return compiled().tokenizer.encode(topics(1))  # type: ignore[union-attr]


def after(model: elision.Model, texts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities of the next but one token after each text, whose last token is decoded."""
    from elision.ir.verify import Request
    from elision.ir.warp import Warp
    from tests.passes.test_kv_matrix import Seen

    found = []
    for text in texts:
        session = Session(model._interpreter, 1, len(text) + 1)
        requests = Seen([Request(Warp(), True, 0, 0)], [torch.tensor(text)], [len(text) - 1])
        with torch.inference_mode():
            session.prefill([text[:-1]])
            session.round({0: text[-1]}, requests)
        found.append(requests.logits[0].double().log_softmax(-1).clone())
    return torch.cat(found)


METHODS = ["h2o:recent=32,budget={}", "snapkv:budget={}", "keyformer:recent=32,budget={}", "ems:budget={}"]


@pytest.mark.parametrize("text", METHODS)
def test_more_is_better_on_twenty_texts(text: str) -> None:
    """The divergence from the whole cache after 512 tokens, mean over 20 texts, falls with the budget."""
    step = len(words()) // 20
    texts = [words()[i * step : i * step + 513] for i in range(20)]
    want = after(compiled(), texts)
    found = []
    for budget in BUDGETS:
        got = after(compiled(text.format(budget)), texts)
        found.append(float((want.exp() * (want - got)).sum(-1).mean()))
    spread = found[0] - found[-1]
    assert found[-1] < found[0] / 2 and all(b < a + 0.05 * spread for a, b in zip(found, found[1:], strict=False)), found


def planted(colour: str, code: str) -> str:
    """A fact in the middle of 1200 tokens of other text, and the beginning of a sentence that asks for it."""
    tokenizer = compiled().tokenizer
    assert tokenizer is not None
    half = [tokenizer.decode(words()[i : i + 600]) for i in (0, 600)]
    return f"{half[0]}\nRemember this: the code of the {colour} door is {code}.\n{half[1]}\nThe code of the {colour} door is"


def found_by(model: elision.Model) -> list[bool]:
    return [code in model.generate(planted(colour, code), max_new_tokens=6, do_sample=False) for colour, code in FACTS]


def test_a_planted_fact_is_found_again() -> None:
    """By what looks at the prompt's end before it evicts, wherever the whole cache finds it; a window has lost it. Only the
    beginning of the fact is looked at: what follows stays by the pooling."""
    whole = found_by(compiled())
    assert sum(whole) >= 3
    kept = found_by(compiled("snapkv:budget=400,pool=13"))
    assert sum(k for k, w in zip(kept, whole, strict=True) if w) >= sum(whole) - 1
    assert sum(found_by(compiled("streaming-llm:window=396"))) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="smaps is Linux's")
@pytest.mark.parametrize(("passes", "share"), [((), 1.0), (("h2o:budget=2000",), 0.3), (("kv-quant",), 0.3)])
def test_resident_pages_are_those_of_the_type(passes: tuple[str, ...], share: float) -> None:
    """After a prompt of 8000 tokens: what the process holds for the states, by the kernel's count, is what the types say."""
    model: Any = elision.compile(
        tiny(hidden_size=256, num_key_value_heads=4, num_hidden_layers=2, max_position_embeddings=8192), passes=list(passes)
    )
    ids = torch.randint(1, 60, (8000,), generator=torch.Generator().manual_seed(0)).tolist()

    def run() -> Session:
        session = Session(model._interpreter, 1, 8064)
        with torch.inference_mode():
            session.prefill([ids])
        return session

    run()
    gc.collect()
    before = resident()
    session = run()
    gc.collect()
    trim()
    held = resident() - before
    assert abs(held - session.bytes()) <= 0.03 * session.bytes(), (held, session.bytes())
    assert session.bytes() <= share * 8064 * 2 * 4 * 128 * 4 * 1.01


def resident() -> int:
    trim()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def trim() -> None:
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
