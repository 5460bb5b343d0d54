"""calm: tokens that are sure leave early, the same on segments of a step as when everything is computed and chosen from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from programs import tiny_llama

import elision
from elision.errors import BadInput, IllegalProgram
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.ir.interp import Interpreter
from elision.ir.ops.exits import undecided
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.requests import Requests
from elision.ir.tokens import Tokens
from elision.ir.value import Value
from elision.ir.verifier import verify
from elision.ir.verify import Request
from elision.passes.calibration import run_score
from elision.passes.layers.classifier import logistic
from elision.passes.pipeline import run
from elision.runtime.session import Session
from elision.runtime.speculation import drafting_of
from tests.passes.deep import LAYERS, compiled
from tests.passes.poisoned import rounds
from tests.passes.small import ragged

#: Settings with which some tokens leave at each exit, and some at none.
FILLS = ["threshold=0.8", "threshold=0.8,fill=mask", "threshold=0.8,fill=defer"]
SETTINGS = [*FILLS, "threshold=0.2,rule=softmax", "threshold=0.85,length=30"]


def method(setting: str) -> str:
    return f"calm:exits=2+3+5,{setting}"


def tokens(model: elision.Model, new: int = 40) -> torch.Tensor:
    found = model.generate(*ragged(), max_new_tokens=new)
    assert isinstance(found, torch.Tensor)
    return found


def left(model: elision.Model, ids: torch.Tensor) -> list[int]:
    """How many tokens go on at each exit of the model's own forward."""
    found: list[int] = []

    def observe(value: Value, operands: Any) -> None:
        if value.op == "which":
            found.append(int(operands[0].sum()))

    at = Tokens.chunk([ids.shape[1]] * len(ids), [0] * len(ids))
    graph = model.program.entries["score"]
    with torch.inference_mode():
        interpreter = Interpreter(model.program, model.weights, observe=observe)
        interpreter.run(graph, {graph.names[graph.inputs[0]]: ids.flatten()}, {graph.inputs[0].tensor.tokens.name: at})  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_parts_are_computing_all_and_choosing(setting: str, target: str) -> None:
    """After a prompt of one token every token is generated: what is said is what the forward says, which computes all layers."""
    model = compiled(method(setting), target=target)
    said = model.generate(torch.tensor([[5], [9], [33]]), max_new_tokens=40)
    assert torch.equal(model(said).logits[:, :-1].argmax(-1), said[:, 1:])
    assert not torch.equal(said, compiled().generate(torch.tensor([[5], [9], [33]]), max_new_tokens=40))
    went = left(model, said[:, :-1])
    assert 3 * 40 > went[0] > went[-1] > 0 and went == sorted(went, reverse=True)


@pytest.mark.parametrize("setting", FILLS)
def test_natively_with_other_rows(setting: str) -> None:
    model = compiled(method(setting), target="cpu")
    assert model.native is not None and "step" not in model.native.schedules
    assert {op for name, hosts in model.native.hosts.items() if name != "score" for op, _ in hosts} <= {"undecided"}
    together = tokens(model)
    assert torch.equal(together, tokens(compiled(method(setting))))
    ids, mask = ragged()
    for row in range(4):
        alone = model.generate(ids[row : row + 1, ids.shape[1] - int(mask[row].sum()) :], max_new_tokens=40)
        assert torch.equal(alone[0, -40:], together[row, -40:])


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("setting", FILLS)
def test_speculation_changes_nothing(setting: str, target: str) -> None:
    """A draft's nodes leave at exits of their own, its later nodes see what their ancestors left."""
    model = compiled(method(setting), "token-recycling:nodes=20", "pain-trie:nodes=20", target=target)
    fresh = drafting_of(model._interpreter, "")
    assert isinstance(fresh, Drafting)
    model.drafting = Drafting(fresh.drafters, Always(12))
    assert torch.equal(tokens(model), tokens(compiled(method(setting), target=target)))
    assert model.stats is not None and model.stats.accepted > 10


@pytest.mark.parametrize("text", ["calm", "calm:exits=2+3+5,threshold=1.1", "calm:exits=3,threshold=1.5,rule=softmax,fill=mask"])
def test_the_identity(text: str) -> None:
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(compiled(text)(ids).logits, compiled()(ids).logits)
    assert torch.equal(tokens(compiled(text)), tokens(compiled()))


def test_a_higher_threshold_goes_deeper() -> None:
    """On the same tokens; the divergence from the whole model falls."""
    program, weights = tiny_llama(layers=LAYERS)
    ids = list(torch.randint(0, 64, (6, 40), generator=torch.Generator().manual_seed(1)))
    whole = run_score(program, weights, ids)[0].log_softmax(-1)
    depths, losses = [], []
    for threshold in (0.1, 0.8, 0.88, 1.1):
        went: list[int] = []

        def observe(value: Value, operands: Any, went: list[int] = went) -> None:
            went += [int(operands[0].sum())] if value.op == "which" else []

        found = run_score(run(program, [f"calm:exits=1+2+3+4+5,threshold={threshold}"]), weights, ids, observe)[0]
        depths.append(sum(went))
        losses.append(float((whole.exp() * (whole - found.log_softmax(-1))).sum(-1).mean()))
    assert depths == sorted(depths) and depths[0] == 5 * 6 and depths[-1] == 5 * 240 and len(set(depths)) == 4
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-6


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("drafter", [(), ("token-recycling:nodes=20",)])
@torch.inference_mode()
def test_nothing_reads_what_was_not_written(setting: str, drafter: tuple[str, ...]) -> None:
    """Caches filled with one finite number or with another: the same tokens, and the same logits to the bit."""
    model = compiled(method(setting), *drafter)
    first, second = (rounds(model, poison) for poison in (1e4, -7.5))
    assert len(first) > 10 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_goes_on_sees_what_the_whole_model_computed() -> None:
    """With fill=defer, a token that stays to the end says what it says in the whole model, whoever left before it."""
    ids = torch.randint(0, 64, (4, 40), generator=torch.Generator().manual_seed(2))
    whole = compiled()(ids).logits
    same = {}
    for fill in ("defer", "propagate"):
        model = compiled(method(f"threshold=0.8,fill={fill}"))
        same[fill] = int((model(ids).logits == whole).all(-1).sum())
        stays = left(model, ids)[-1]
        assert 0 < stays < 160
        assert (same[fill] == stays) == (fill == "defer")


@pytest.mark.parametrize("target", ["reference", "cpu"])
@torch.inference_mode()
def test_caches_catch_up(target: str) -> None:
    """With fill=defer, caches after an exit have the entries of the whole model up to what is held there, in order."""
    model, base = compiled(method(SETTINGS[2]), target=target), compiled(target=target)
    said = model.generate(torch.tensor([[5, 8]]), max_new_tokens=40)[0]
    sessions = [Session(m._interpreter, 1, 64) for m in (model, base)]
    lags = set()
    for session in sessions:
        session.prefill([said[:2].tolist()])
    for at in range(2, len(said) - 1):
        for session in sessions:
            session.round({0: int(said[at])}, Requests([Request()], [said[: at + 1]], [2]))
        mine, whole = ([s._stores[f"kv_{i}"] for i in range(LAYERS)] for s in sessions)
        counts = [int(store.totals().max()) for store in mine]
        assert counts[:2] == [at + 1] * 2 and counts == sorted(counts, reverse=True)
        held = [int(sessions[0]._stores[f"held_{i}"].totals().max()) for i in (1, 2, 3)]
        assert [counts[1] - counts[2], counts[2] - counts[3], counts[4] - counts[5]] == held
        lags.add(counts[0] - counts[-1])
        for a, b, count in zip(mine, whole, counts, strict=True):
            for what in "kv":
                torch.testing.assert_close(a.entries(what, count), b.entries(what, count), rtol=1e-4, atol=1e-4)
    assert min(lags) == 0 and max(lags) > 2


@pytest.mark.parametrize("kind", ["all", "masked", "nested"])
def test_what_joins_late_says_so(kind: str) -> None:
    program = run(tiny_llama(layers=LAYERS)[0], ["calm:exits=2+4,fill=defer"])
    verify(program)
    text = print_program(program)
    with pytest.raises(IllegalProgram, match="validity.*kv_[2-5] is not filled"):
        verify(parse_program(text.replace("deferred", kind)))


def test_the_rules() -> None:
    h = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    at = Tokens(torch.zeros(3, dtype=torch.int64), torch.tensor([1, 10, 1000]), 1)
    before = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    assert undecided(h, before, rule="similarity", threshold=0.9, at=at).tolist() == [False, True, False]
    logits = torch.tensor([[5.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.0, 0.0]])
    assert undecided(h, logits, rule="softmax", threshold=0.5, at=at).tolist() == [False, True, True]
    w, b = torch.tensor([2.0, -2.0]), torch.tensor(0.5)
    assert undecided(h, w, b, rule="classifier", threshold=0.6, at=at).tolist() == [False, True, False]
    prompt = Tokens(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 2]), 1)
    assert undecided(h, before, rule="similarity", threshold=0.9, at=prompt).tolist() == [True, True, False]
    on = torch.tensor([True, False, True])
    assert undecided(h, before, on, rule="similarity", threshold=1.1, at=at).tolist() == [True, False, True]
    sure = torch.tensor([[0.86, 0.14]]).log().expand(3, 2)  # 0.72 sure; the threshold falls from 0.73 to 0.63
    assert undecided(h, sure, rule="softmax", threshold=0.7, length=40, at=at).tolist() == [True, False, False]


def test_a_fitted_classifier_says_where_the_answer_is_known() -> None:
    """Its confidence is larger where the likeliest token of the stream is that of the whole model, and parts use it natively."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    y = (x[:, 0] - 2 * x[:, 3] + 0.1 * torch.randn(400, generator=generator) > 0.5).float()
    w, b = logistic(x, y)
    assert float((((x @ w + b) > 0) == (y > 0)).float().mean()) > 0.95
    model = compiled(f"{method('threshold=0.4')},rule=classifier", target="cpu", text=True)
    said = model.generate(torch.tensor([[5], [9], [33]]), max_new_tokens=40)
    assert torch.equal(model(said).logits[:, :-1].argmax(-1), said[:, 1:])
    with pytest.raises(BadInput, match="without a tokenizer"):
        compiled(f"{method('threshold=0.4')},rule=classifier")


OTHERS = [("int8:group=32", "a8"), ("skip-layers:layers=1",), ("kv-quant",), ("int4",)]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "setting, others",
    [*((SETTINGS[i], others) for i in (0, 2) for others in OTHERS), (SETTINGS[0], ("streaming-llm:window=21,sinks=3",))],
)
def test_with_other_methods(setting: str, others: tuple[str, ...]) -> None:
    text = method(setting)
    assert torch.equal(tokens(compiled(text, *others, target="cpu")), tokens(compiled(text, *others)))


def test_what_does_not_compose_is_named() -> None:
    program, _ = tiny_llama(layers=LAYERS)
    for passes in (["calm:exits=3", "h2o:budget=24,recent=8"], ["calm:exits=3,fill=mask", "layer-skip-draft:layers=1"]):
        with pytest.raises(IllegalProgram, match="validity"):
            run(program, passes)
    for passes in (["streaming-llm:window=21"], ["kivi:residual=32"], ["layer-skip-draft:layers=1"]):
        with pytest.raises(IllegalProgram, match="validity"):
            run(program, ["calm:exits=3,fill=defer", *passes])
    with pytest.raises(IllegalProgram, match="validity"):
        run(program, ["calm:exits=3", "skipdecode:most=6,least=2"])
    for text in ("exits=0", "exits=6", "exits=2,rule=luck", "exits=2,fill=guess", "exits=2,threshold=0.0"):
        with pytest.raises(BadInput, match="calm"):
            run(program, [f"calm:{text}"])


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2]])
def test_as_text_and_in_an_artefact(setting: str, tmp_path: Path) -> None:
    model = compiled(method(setting), target="cpu")
    assert parse_program(print_program(model.program)) == model.program
    model.save(tmp_path / "model.elision")
    assert torch.equal(tokens(elision.load(tmp_path / "model.elision")), tokens(model))
