"""Random lists of passes with random parameters on tiny models: refused by an error of our own, or what the interpreter gives."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, get_type_hints

import torch
from families import decoder as family
from hypothesis import strategies as st

import elision
from elision.errors import ElisionError, IllegalProgram
from elision.frontend.capture import capture
from elision.frontend.raising import raise_model
from elision.passes import REGISTRY
from tests.compose.matrix import NEAR, ROUNDED, distance
from tests.compose.settings import SETTINGS
from tests.compose.subjects import Generating, Subject, decoder, encoding

#: Decoders of another kind of attention each.
FAMILIES = ("gpt2", "mistral", "gemma3", "deepseek_v3", "phi")
MODELS = ("decoder", "encoder", *FAMILIES)
OWN = {name: cls for name, cls in REGISTRY.items() if cls.__module__.startswith("elision.")}
#: What a search or a calibration takes is kept small.
COSTS = {"generations", "offspring", "small", "large", "tokens", "steps", "prompts", "rounds", "memory", "slots"}
WORDS = sorted(set(re.findall(r"[a-z0-9-]{2,12}", " ".join(cls.__doc__ or "" for cls in OWN.values()))) - {"model"})
SAID = ["attn", "mlp", "mean", "heads", "propagate", "mask", "softmax", "classifier", "match", "k-seq", "bf16", "int8"]
ROUNDING = {"insert-cache", "kv-quant", "kivi", "gear", "a8"}


def _values(name: str, hint: Any) -> st.SearchStrategy[Any]:
    number: st.SearchStrategy[Any] = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 128, 1024])
    number = number.filter(lambda n: n <= 64) if name in COSTS else number
    share = st.sampled_from([-0.5, 0.0, 0.1, 0.25, 0.5, 0.6, 0.9, 1.0, 1.5, 2.0, float("inf")])
    words = st.sampled_from(SAID) | st.sampled_from(WORDS)
    if hint is bool:
        return st.booleans()
    if hint is int:
        return number
    if hint is float:
        return share
    if hint is str:
        return st.just("MODEL") | words if name == "model" else words
    if hint == int | str:
        return number | st.just("row") | words
    if hint == float | str:
        return share | st.just("search") | words
    return st.lists(st.integers(0, 8), max_size=3).map(tuple)


@st.composite
def step(draw: st.DrawFn) -> str:
    """A pass as text: its small setting, its defaults or nothing of it, with some fields drawn anew."""
    label = draw(st.sampled_from(list(SETTINGS)))
    text = SETTINGS[label].passes[0]
    cls = OWN[text.partition(":")[0]]
    hints = get_type_hints(cls)
    known = dict(part.split("=") for part in filter(None, text.partition(":")[2].split(",")))
    fields = [f.name for f in dataclasses.fields(cls)]
    for field in draw(st.lists(st.sampled_from(fields), max_size=2, unique=True)) if fields else []:
        value = draw(_values(field, hints[field]))
        shown = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
        known[field] = shown.replace("True", "true").replace("False", "false")
    given = [f"{field}={value}" for field, value in known.items() if value != ""]
    return f"{cls.name}:{','.join(given)}" if given else cls.name


lists = st.lists(step(), min_size=1, max_size=4)


class Family(Generating):
    """A tiny decoder of one of the families of the frontend's tests."""

    def __init__(self, name: str) -> None:
        self.name = name
        found = raise_model(capture(family(name)), name, positions=128)
        self.program, self.weights, self.stored = found.program, found.weights, {}


@functools.cache
def subject(name: str) -> Subject:
    return decoder() if name == "decoder" else encoding() if name == "encoder" else Family(name)


def outcome(name: str, texts: list[str]) -> str:
    """``rule NAME`` or ``says NAME`` for a list that is refused, else ``equal``, or ``tokens`` where something drafts. Fails for
    what is neither, and for any error that is not one of our own."""
    model = subject(name)
    try:
        program, weights = model.transformed(texts)
    except ElisionError as error:
        return refused(error, texts)
    if any(OWN[text.partition(":")[0]].family == "speculate" for text in texts):
        rest = [text for text in texts if OWN[text.partition(":")[0]].family != "speculate"]
        assert isinstance(model, Generating)
        try:
            got = model.tokens(model.model(program, weights, native=True))
        except ElisionError as error:
            return refused(error, texts)
        want = model.tokens(model.model(*model.transformed(rest), native=True))
        assert torch.equal(got, want), f"{name} {texts}: drafts change tokens"
        return "tokens"
    near = ROUNDED if any(text.partition(":")[0] in ROUNDING for text in texts) else NEAR
    far = [0.0]
    for seed in (1, 2):  # a choice between equals may fall either way, but not twice
        model.seed = seed
        ran = [run(model, model.model(program, weights, native)) for native in (True, False)]
        if isinstance(ran[0], ElisionError) or isinstance(ran[1], ElisionError):
            assert isinstance(ran[0], ElisionError) and isinstance(ran[1], ElisionError), f"{name} {texts}: {ran}"
            return refused(ran[0], texts)
        far.append(distance(*ran))
        if far[-1] <= near:
            return "equal"
    raise AssertionError(f"{name} {texts}: native code is {far[1:]} of the largest logit from the interpreter")


def run(model: Subject, compiled: elision.Model) -> torch.Tensor | ElisionError:
    try:
        return model.outputs(compiled, -7.5 if compiled.native is None else 1e4)
    except ElisionError as error:
        return error


def refused(error: ElisionError, texts: list[str]) -> str:
    if isinstance(error, IllegalProgram):
        return f"rule {error.rule}"
    said = str(error).splitlines()[0]
    names = [n for text in texts if said.removeprefix("pass ").startswith(n := text.partition(":")[0])]
    assert names, f"{texts}: {said!r} does not begin with the name of one of them"
    return f"says {max(names, key=len)}"
