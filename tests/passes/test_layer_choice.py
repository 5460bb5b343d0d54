"""Methods that choose layers to leave out: what they choose, that nothing is the identity, and what caches hold afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
import torch
from programs import tiny_llama

from elision.errors import BadInput
from elision.ir.canonical import canonical
from elision.ir.interp import Interpreter
from elision.ir.program import Program
from elision.ir.states import KV
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.passes import EvoPress, ShortGPT, from_text
from elision.passes.calibration import Text
from elision.passes.layers.depth import evenly
from elision.passes.layers.evolution import evolve
from elision.passes.layers.evopress import Divergence
from elision.passes.layers.shortgpt import block_influence
from elision.passes.pipeline import run, transform
from elision.runtime.session import Session
from tests.passes.calibrating import Weights, ids, logits

LAYERS = 6
SMALL = "generations=3,offspring=3,small=40,large=80"


def model() -> tuple[Program, Weights]:
    """Layers that do different amounts of work: 3, then 1, least of all."""
    program, weights = tiny_llama(layers=LAYERS)
    for name in weights:
        for layer, size in ((3, 0.01), (1, 0.1)):
            if name in (f"{layer}.o", f"{layer}.down"):
                weights[name] = weights[name] * size
    return program, weights


def transformed(*passes: str) -> tuple[Program, Weights]:
    return transform(*model(), passes, Text(ids()))


def test_shortgpt_leaves_out_what_changes_the_stream_least() -> None:
    program, weights = model()
    influence = block_influence(program, weights, list(ids()))
    assert sorted(influence, key=influence.__getitem__)[:2] == [3, 1] and list(influence) == list(range(LAYERS))
    assert all(0 < bi < 2 for bi in influence.values()) and influence[3] < 0.01 < max(influence.values())
    left, chosen = list[list[int]](), list[str]()
    for share in (0.2, 0.34, 0.5):
        found, _ = transformed(f"shortgpt:share={share}")
        left.append(list(found.layers))
        chosen.append(found.applied[-1])
    assert left[0] == [0, 1, 2, 4, 5] and left[1] == [0, 2, 4, 5] and len(left[2]) == 3
    assert set(left[2]) < set(left[1]) and chosen[1] == "shortgpt:share=0.34,layers=1+3"
    again = run(model()[0], [chosen[1]])  # the text alone says it
    assert canonical(again) == canonical(transformed_without_text("skip-layers:layers=1+3"))


def test_evopress_finds_what_matters_least_and_says_it() -> None:
    program, weights = model()
    full, _ = transformed("evopress:share=0.34," + SMALL)
    step = from_text(full.applied[-1])
    assert isinstance(step, EvoPress) and len(step.attn) == len(step.mlp) == 2
    assert transformed("evopress:share=0.34," + SMALL)[0].applied == full.applied  # the seed decides
    measure = Divergence(program, weights, list(ids()))
    best = (frozenset({1, 3}), frozenset({1, 3}))
    whole = range(len(ids()))
    nothing, least, other = measure([(frozenset(), frozenset()), best, (frozenset({0, 5}), frozenset({0, 5}))], whole)
    assert nothing == pytest.approx(0, abs=1e-6) and least < 0.5 * other
    found = measure([(frozenset(step.attn), frozenset(step.mlp))], whole)[0]
    assert found < other


def test_the_search_keeps_the_best() -> None:
    """Parts of the text disagree by more than candidates differ; the best on all of it never gets worse, and is found in a small
    space. A candidate is compared with its parent on the same parts only, and few see all of them."""
    noise, told, seen = [Random(0).uniform(-30, 30) for _ in range(16)], list[float](), list[int]()

    def losses(candidates: Sequence[int], parts: Sequence[int]) -> list[float]:
        seen.append(len(candidates) * len(parts))
        return [sum(abs(c - 37) + noise[i] for i in parts) / len(parts) for c in candidates]

    best = evolve(
        [90, 80], lambda parent, random: parent + random.randint(-9, 9), losses, generations=40, offspring=5,
        stages=((1, 2), (4, 1), (16, 1)), random=Random(1), report=lambda generation, best, loss: told.append(loss),
    )  # fmt: skip
    assert best == 37 and len(told) == 41 and all(b <= a for a, b in zip(told, told[1:], strict=False))
    assert told[0] == losses([80], range(16))[0]  # the best of the start
    assert sum(seen) < 41 * 6 * 16


def test_a_search_is_not_led_astray_by_a_lucky_part() -> None:
    """Better on every part alone but one, and worse on the whole: it does not replace its parent."""

    def losses(candidates: Sequence[int], parts: Sequence[int]) -> list[float]:
        return [c * sum(10.0 if i == 7 else -1.0 for i in parts) / len(parts) for c in candidates]

    stages = ((1, 2), (3, 1), (8, 1))
    best = evolve([0], lambda parent, random: 1, losses, generations=20, offspring=2, stages=stages, random=Random(2))
    assert best == 0


@pytest.mark.parametrize("layers", [1, 2, 6, 30])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 20, 30])
def test_unified_skip_spreads_what_stays(layers: int, count: int) -> None:
    kept = evenly(layers, count)
    assert len(kept) == len(set(kept)) == max(1, min(layers, count)) and kept == sorted(kept)
    assert kept[-1] == layers - 1 and (len(kept) == 1 or kept[0] == 0)
    if len(kept) > 1:
        assert max(b - a for a, b in zip(kept, kept[1:], strict=False)) <= -(-(layers - 1) // (len(kept) - 1))


def test_unified_skip_leaves_out_the_others() -> None:
    assert list(transformed_without_text("unified-skip:speedup=2").layers) == [0, 2, 5]
    assert list(transformed_without_text("unified-skip:speedup=5").layers) == [5]


def transformed_without_text(*passes: str) -> Program:
    return run(model()[0], passes)


@pytest.mark.parametrize("text", ["shortgpt", "evopress", "unified-skip", "shortgpt:share=0.1"])
def test_nothing_left_out_is_the_identity(text: str) -> None:
    program, weights = model()
    plain = run(program, [])
    same = run(program, [text])
    assert canonical(same) == canonical(plain) and torch.equal(logits(same, weights), logits(plain, weights))


METHODS = [
    "skip-layers:layers=1+4",
    "skip-layers:layers=2,half=attn",
    "shortgpt:share=0.34",
    "evopress:share=0.34," + SMALL,
    "unified-skip:speedup=2",
]


@pytest.mark.parametrize("text", METHODS)
@torch.inference_mode()
def test_nothing_reads_what_was_not_written(text: str) -> None:
    """Caches filled with one finite number or with another: the same outputs to the bit, and those of a run without a cache."""
    needs_text = text.startswith(("shortgpt", "evopress"))
    program, weights = transform(*model(), [text], Text(ids() if needs_text else None))
    prompts = [ids()[0, :9].tolist(), ids()[1, :4].tolist()]
    found = [_decode(program, weights, prompts, poison) for poison in (1e4, -7.5)]
    assert len(found[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    whole = [prompts[0] + [5, 5, 5], prompts[1] + [5, 5, 5]]
    want = Interpreter(program, weights).run(
        program.entries["score"], {"ids": torch.tensor(sum(whole, []))}, {"t": Tokens.chunk([12, 7], [0, 0])}
    )[0]
    torch.testing.assert_close(found[0][-1], want[[11, 18]], rtol=1e-4, atol=1e-4)


def _decode(program: Program, weights: Weights, prompts: list[list[int]], poison: float) -> list[torch.Tensor]:
    """The logits after the prompts and of three steps."""
    session = Session(Interpreter(program, weights), 2, 16)
    for name, type in program.states.items():
        assert isinstance(type, KV)
        session._stores[name] = KVStore(type, 2, 16, torch.float64, poison)
    found = [session.prefill(prompts)]
    step, at = program.entries["step"], [len(p) for p in prompts]
    for _ in range(3):
        drafted = Tokens(torch.arange(2), torch.tensor(at), 2, torch.tensor([-1, -1]), torch.tensor([1, 1]))
        found.append(session._run(step, {"ids": torch.tensor([5, 5])}, drafted)[0])
        for store in session._stores.values():
            store.commit([[0], [0]])
        at = [n + 1 for n in at]
    return found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("shortgpt:share=1.0", "share=1.0; expected a part of the layers"),
        ("shortgpt:share=0.5", "chooses on text"),
        ("shortgpt:layers=9", "there is no layer 9"),
        ("evopress:share=-0.1", "share=-0.1; expected a part"),
        ("evopress:share=0.5", "searches on text"),
        ("evopress:share=0.5,attn=9", "there is no layer 9"),
        ("unified-skip:speedup=0.5", "speedup=0.5; expected 1 to 5.07"),
        ("unified-skip:speedup=6", "speedup=6.0; expected 1 to 5.07"),
    ],
)
def test_bad_settings(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        run(model()[0], [text])


def test_what_the_text_of_a_choice_needs() -> None:
    with pytest.raises(BadInput, match="came without a tokenizer"):
        transform(*model(), ["shortgpt:share=0.5"], Text())
    program, weights = model()
    assert ShortGPT(0.5, (1, 2, 3)).choose(program, weights, Text()) == ShortGPT(0.5, (1, 2, 3))
