"""What composes with what, found by compiling and running lists of passes on tiny models (`subjects`).

A list is refused, by a legality rule or by one of its passes in words of its own, or it is compiled and what it computes is
compared with an oracle. None of them sees the composition itself:

- ``tokens``: of passes that draft. Native decoding with drafts in every round gives the greedy tokens of the list without them,
  which has a cell of its own.
- ``torch``: every pass says another model: the same one, one without some layers, one with other weights. The logits are those of
  PyTorch's own forward of that model. The weights are those that the artefact stores, decoded (what a format rounds to is no
  matter of composition; that it rounds is seen by the effect, below); the layers are those that the settings name.
- ``model``: some passes say another model, the others do something to it. The logits are those that the reference interpreter
  gives with only the others, on that model.
- ``orders``: neither. The passes are given in the other order, and the logits are those of the reference interpreter. Where both
  orders give the same program (the pipeline orders by what passes change) or the other one is refused or means something else
  (``order``), this says only that native code does what the interpreter does with the program, and what follows.

In every cell that is compiled, moreover: caches are filled with one number before the native run and with another before the
other, which checks too that what is read was written; every pass that is not exact has an effect on the logits that the
others give, so none is dropped in silence; the qualities are joined; and the text of the passes is in ``applied``.

Logits are those of a given text behind two prompts of different lengths, 20 tokens of one that nobody would say, so that every
clock ticks; of the encoder, the outputs of all tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from elision.errors import ElisionError, IllegalProgram
from elision.ir.program import QUALITIES, Program, Weights
from elision.passes.base import CHANGES
from elision.passes.pipeline import resolve
from tests.compose.settings import SETTINGS
from tests.compose.subjects import Subject, decoder, encoding

#: Labels of `SETTINGS`, in the order in which they are given.
Labels = tuple[str, ...]
SUBJECTS = ("decoder", "encoder")
#: Of the largest logit, how far native logits may be from those of the oracle: of sums in another order, and of numbers that
#: fall on the other side of where they are rounded.
NEAR, ROUNDED = 2e-4, 0.05
ROUNDS = {"insert-cache:int8", "kv-quant", "kivi", "gear", "a8", "int8 a8"}
EFFECT = 1e-5
#: Where one sets again what the other has set, and where the other leaves only weights that are bytes in the file.
AGAIN = [{"insert-cache:int8", "kv-quant"}, {"int8 a8", "a8"}, {"gptq", "int8"}, {"smoothquant-plus", "int8"}]


@dataclass(frozen=True)
class Refused:
    """``by``: the rule, or the pass that says so; ``rule``: whether it is one; ``said``: the first line of the message."""

    by: str
    rule: bool
    said: str

    def __str__(self) -> str:
        return f"rule {self.by}" if self.rule else f"says {self.by}"


def subject(name: str) -> Subject:
    return decoder() if name == "decoder" else encoding()


def texts(labels: Labels) -> list[str]:
    return [text for label in labels for text in SETTINGS[label].passes]


def canonical(labels: Labels) -> Labels:
    """The labels in the order in which the pipeline runs their passes: lists that have the same are one cell."""
    return tuple(sorted(labels, key=lambda label: CHANGES.index(resolve(SETTINGS[label].passes)[0].changes)))


@functools.lru_cache(maxsize=64)
def transformed(name: str, labels: Labels) -> tuple[Program, Weights] | Refused:
    """The program and weights, or who refuses. Fails for any other error, and for a message that names neither a rule nor one of
    the passes at its beginning."""
    try:
        return subject(name).transformed(texts(labels))
    except IllegalProgram as error:
        return Refused(error.rule, True, str(error).splitlines()[0])
    except ElisionError as error:
        said = str(error).splitlines()[0]
        names = [n for text in texts(labels) if said.removeprefix("pass ").startswith(n := text.partition(":")[0])]
        assert names, f"{labels}: {said!r} does not begin with the name of one of them"
        return Refused(max(names, key=len), False, said)


def verdict(name: str, labels: Labels, run: bool = True) -> str:
    """Who refuses the list, or by which oracle it computes what it should (``legal``, unless ``run``); fails if it does not."""
    found = refused(name, canonical(labels))
    return str(found) if found else compared(name, canonical(labels)) if run else "legal"


@functools.cache
def refused(name: str, labels: Labels) -> Refused | None:
    found = transformed(name, labels)
    return found if isinstance(found, Refused) else None


@functools.cache
def compared(name: str, labels: Labels) -> str:
    found = transformed(name, labels)
    assert not isinstance(found, Refused)
    declared(found[0], labels)
    drafting = [label for label in labels if SETTINGS[label].means == "tokens"]
    if drafting:
        drafts(name, labels, tuple(label for label in labels if label not in drafting))
        return "tokens"
    got = native(name, labels)
    kind, want = oracle(name, labels)
    check(labels, kind, got, want)
    for label in set(labels):
        effect(name, labels, label, got)
    return kind


def declared(program: Program, labels: Labels) -> None:
    """The quality is the join of those of the passes, and all of them are there."""
    steps = resolve(text.replace("MODEL", "x") for text in texts(labels))
    quality = max((step.quality for step in steps), key=QUALITIES.index, default="exact")
    assert QUALITIES.index(program.quality) >= QUALITIES.index(quality), (labels, program.quality)
    names = [text.partition(":")[0] for text in program.applied]
    own = ("insert-cache", "clean")  # are always there
    assert sorted(n for n in names if n not in own) == sorted(s.name for s in steps if s.name not in own)


@functools.cache
def native(name: str, labels: Labels) -> torch.Tensor:
    """What native code gives of the list, on caches that are filled with a number."""
    found = transformed(name, labels)
    assert not isinstance(found, Refused), (labels, found)
    return subject(name).outputs(subject(name).model(*found, native=True), 1e4)


@functools.cache
def interpreted(name: str, labels: Labels) -> torch.Tensor:
    found = transformed(name, labels)
    assert not isinstance(found, Refused), (labels, found)
    return subject(name).outputs(subject(name).model(*found, native=False), -7.5)


@functools.cache
def said(labels: Labels) -> tuple[torch.Tensor, int, int]:
    """The greedy tokens of the decoder with the list, how many nodes were drafted, and how many of these became tokens."""
    found = transformed("decoder", labels)
    assert not isinstance(found, Refused), (labels, found)
    model = decoder().model(*found, native=True)
    tokens = decoder().tokens(model)
    assert model.stats is not None
    return tokens, model.stats.drafted, model.stats.accepted


def drafts(name: str, labels: Labels, rest: Labels) -> None:
    """Drafts change no token. Some are run, and of a drafter alone some are right."""
    assert name == "decoder"
    tokens, drafted, accepted = said(labels)
    assert torch.equal(tokens, said(rest)[0]), f"{labels}: drafts change the tokens of {rest}"
    assert drafted > 0 and (rest or accepted > 0), f"{labels}: {drafted} nodes drafted, {accepted} taken"


def check(labels: Labels, kind: str, got: torch.Tensor, want: torch.Tensor) -> None:
    far = distance(got, want)
    near = ROUNDED if ROUNDS & set(labels) else NEAR
    assert far <= near, f"{labels}: {far:.2e} of the largest logit from {kind}"


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and bool(got.isfinite().all())
    return float((got - want).abs().max() / want.abs().max())


def effect(name: str, labels: Labels, label: str, got: torch.Tensor) -> None:
    """A pass that is not exact changes what the others give (where they are legal without it)."""
    rest = tuple(other for other in labels if other != label)
    approximate = any(step.quality == "approximate" for step in resolve(SETTINGS[label].passes))
    if approximate and not refused(name, rest) and not any(pair <= {*labels} for pair in AGAIN):
        assert distance(got, native(name, rest)) > EFFECT, f"{labels}: {label} does nothing"


def oracle(name: str, labels: Labels) -> tuple[str, torch.Tensor]:
    """What the outputs should be, and how that is known."""
    other, rest = meant(labels)
    if other and (found := on_another_model(name, labels, other, rest)) is not None:
        return found
    want = interpreted(name, labels)
    turned = canonical(labels[::-1])
    if turned == labels:
        return "native", want
    if not refused(name, turned):
        again = interpreted(name, turned)
        near = ROUNDED if ROUNDS & set(labels) else NEAR
        if distance(again, want) <= near:
            return "orders", again
    return "order", want


def meant(labels: Labels) -> tuple[Labels, Labels]:
    """The passes that say another model, and the others. What a8 does depends on how weights are stored, so these are not another
    model beside it; nor are layers left out where a pass asks which there are."""
    kinds = {"same", "layers", "weights"}
    if any("a8" in SETTINGS[label].passes for label in labels):
        kinds = {"layers"}
    if any(SETTINGS[label].whole for label in labels):
        kinds -= {"layers"}
    other = tuple(label for label in labels if SETTINGS[label].means in kinds)
    return other, tuple(label for label in labels if label not in other)


def on_another_model(name: str, labels: Labels, other: Labels, rest: Labels) -> tuple[str, torch.Tensor] | None:
    found = transformed(name, labels)
    assert not isinstance(found, Refused)
    program, stored = found
    plain = subject(name)
    weights = dict(plain.weights)
    if any(SETTINGS[label].means == "weights" for label in other):
        for n in plain.weights.keys() & program.params.keys():
            type = program.params[n]
            weights[n] = type.encoding.decode(stored[n], type.row).to(weights[n]) if type.encoding else stored[n]
    gone = frozenset(layer for label in other for layer in SETTINGS[label].gone)
    if not rest:
        eager = plain.eager(weights, gone)
        return None if eager is None else ("torch", eager)
    there = plain.without(gone, weights)
    if there is None:
        return None
    model, weights = there
    try:
        done = model.transformed(texts(rest), weights)
    except ElisionError:
        return None
    return "model", model.outputs(model.model(*done, native=False))
