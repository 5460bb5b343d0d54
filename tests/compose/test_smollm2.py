"""Lists of passes on real weights: drafts change no token, and native code gives the logits of the interpreter."""

from __future__ import annotations

import functools
import random

import pytest

from elision.frontend.capture import capture
from elision.frontend.raising import raise_model
from elision.frontend.source import load_source
from elision.frontend.stored import blocks_of
from elision.ir.weights import Blocks
from elision.runtime.text import Tokenizer
from tests.compose import fuzz
from tests.compose.subjects import Generating

PROMPTS = (
    "A compiler is a program that reads what people write and makes of it what a machine runs. The machine runs what it is "
    "given, whether it is right or not, so one that is not sure says so. A compiler is a program that",
    "Question: which of the four seasons has the longest days, and why? Answer: summer, since then this half of the earth leans",
)


class Real(Generating):
    name = "smollm2"

    def __init__(self) -> None:
        source = load_source("smollm2")
        found = raise_model(capture(source.model), source.name, positions=source.positions)
        self.program, self.weights = found.program, found.weights
        self.stored = blocks_of(found.weights, source.model, source.stored)
        self.program.stored = {name: Blocks(blocks.format) for name, blocks in self.stored.items()}
        assert source.tokenizer is not None
        self._tokenizer = Tokenizer.from_json(*source.tokenizer)

    def prompts(self) -> list[list[int]]:
        return [self._tokenizer.encode(text) for text in PROMPTS[self.seed - 1 :] + PROMPTS[: self.seed - 1]]


@functools.cache
def real() -> Real:
    return Real()


KV = [
    "streaming-llm:window=24,sinks=2", "h2o:budget=32,recent=8", "a2sf:budget=32,recent=8", "keyformer:budget=32,recent=8",
    "ems:budget=32,window=8", "snapkv:budget=32,window=8", "kv-quant", "kivi:bits=4,group=16,residual=16",
    "quest:budget=32,dense=1", "tidal-decode:budget=16", "duo-attention:heads=0-44,sinks=2,window=16",
]  # fmt: skip
DEPTH = ["skip-layers:layers=20+24", "unified-skip:keep=24", "calm:exits=24", "skipdecode:most=30,least=20,length=60,stages=3"]
PROMPT = ["fastv:layer=3,keep=0.5", "llmlingua:keep=0.6,segment=16,first=4,last=8", "g-search:layers=2+8,keep=70+40"]
WEIGHTS = ["stored", "int8", "int4", "bf16"]
DRAFTS = ["token-recycling", "pain-trie", "prompt-lookup", "layer-skip-draft:exit=20", "spectr:exit=20"]


def lists(count: int) -> list[tuple[str, ...]]:
    """Of every kind every method at least once, two to four of different kinds at a time."""
    draw = random.Random(5)
    columns = [[*kind] for kind in (KV, DEPTH, PROMPT, WEIGHTS, DRAFTS)]
    for column in columns:
        draw.shuffle(column)
    found = []
    for i in range(count):
        kinds = draw.sample(columns[1:], draw.choice([1, 2, 3]))
        found.append((columns[0][i % len(KV)], *(kind[i % len(kind)] for kind in kinds)))
    return found


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("texts", lists(22), ids=" ".join)
def test_real_weights(texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "subject", lambda name: real())
    found = fuzz.outcome("smollm2", list(texts))
    assert found in ("equal", "tokens") or found.startswith(("rule", "says"))
