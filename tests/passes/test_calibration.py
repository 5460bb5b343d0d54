"""What passes calibrate on, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from programs import tiny_llama, tiny_scorer

from elision.errors import BadInput
from elision.ir.interp import Interpreter
from elision.ir.tokens import Tokens
from elision.passes import from_text
from elision.passes.calibration import Text, topics
from elision.passes.pipeline import transform
from tests.passes.calibrating import ids


def test_observers_see_every_op_in_order() -> None:
    program, weights = tiny_scorer(layers=1)
    seen: list[str] = []
    at = {"t": Tokens.chunk([3], [0])}
    run = Interpreter(program, weights, observe=lambda value, operands: seen.append(value.op)).run
    assert len(run(program.entries["score"], {"ids": torch.tensor([1, 2, 3])}, at)) == 1
    assert seen[0] == "embed" and seen[1:3] == ["call", "norm"] and seen[-1] == "linear" and seen.count("linear") == 8


def test_sequences_are_spread_evenly() -> None:
    program, _ = tiny_llama(random=False)
    row = torch.arange(64).repeat(40)  # 2560 tokens: five sequences of 512
    assert [len(s) for s in Text(row).sequences(program, 1024)] == [512, 512]
    assert [len(s) for s in Text(row[:700]).sequences(program, 4096)] == [512]
    assert [len(s) for s in Text(row[:300]).sequences(program, 4096)] == [300]
    short = replace(program, meta={**program.meta, "positions": 16})
    assert [len(s) for s in Text(row).sequences(short, 40)] == [16, 16, 16]
    told: list[str] = []

    def encode(text: str) -> list[int]:
        told.append(text)
        return [ord(c) % 64 for c in text[:2000]]

    assert len(Text(None, encode).sequences(program, 1024)) == 2 and told == [topics(0)]
    assert torch.equal(Text(["abc", "", "de"], encode).sequences(program, 9)[0], torch.tensor([ord(c) % 64 for c in "abc"]))
    assert not set(topics(0).splitlines()) >= set(topics(1).splitlines())


@pytest.mark.parametrize(
    ("text", "passes", "says"),
    [
        (Text(), ["gptq"], "came without a tokenizer; give token ids"),
        (Text(["a text"]), ["gptq"], "came without a tokenizer; give token ids"),
        (Text(torch.tensor([[3, 64]])), ["gptq"], "token ids from 3 to 64; expected 0 to 63"),
        (Text(torch.tensor([-1])), ["gptq"], "token ids from -1 to -1"),
        (Text(torch.rand(3)), ["gptq"], "expected texts, or a LongTensor"),
        (Text(torch.zeros(1, 2, 3, dtype=torch.int64)), ["gptq"], "expected texts, or a LongTensor"),
        (Text(torch.tensor([], dtype=torch.int64)), ["gptq"], "at least one token"),
        (Text([]), ["gptq"], "expected texts"),
        (Text(ids()), ["int8"], "no pass calibrates; those that do are calm, "),
        (Text(ids()), ["gptq:bits=3"], "bits=3; expected 4 or 8"),
        (Text(ids()), ["gptq:damp=0"], "damp=0.0; expected a share"),
        (Text(ids()), ["gptq:damp=nan"], "of the expected type|expected a share"),
        (Text(ids()), ["gptq:group=3"], "expected an even group"),
        (Text(ids()), ["gptq:group=48"], r"nothing to store in int4\(group=48\): tiny has 15 float weights"),
        (Text(ids()), ["gptq:tokens=0"], "tokens=0: expected at least 1"),
        (Text(ids()), ["bf16", "gptq"], "tiny has no float weights"),
        (Text(ids()), ["smoothquant-plus:alpha=1.5"], "alpha=1.5; expected a number from 0 to 1, or search"),
        (Text(ids()), ["smoothquant-plus:alpha=best"], "alpha=best; expected a number from 0 to 1, or search"),
        (Text(ids()), ["smoothquant-plus", "gptq"], "tiny has 1 float weights"),
    ],
)
def test_what_cannot_be_is_told(text: Text, passes: list[str], says: str) -> None:
    program, weights = tiny_llama(dtype="f32")
    with pytest.raises(BadInput, match=says):
        transform(program, weights, passes, text)


def test_text_of_passes() -> None:
    assert from_text("smoothquant-plus:alpha=0.5").text() == "smoothquant-plus:alpha=0.5"
    assert from_text("smoothquant-plus:alpha=search").text() == "smoothquant-plus"
    assert from_text("gptq:damp=0.05,bits=8").text() == "gptq:bits=8,damp=0.05"
