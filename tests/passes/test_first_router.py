"""first-router: what a prompt's routers say decides the depth of its continuation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import tiny_llama

import elision
from elision.errors import BadInput, IllegalProgram
from elision.ir.canonical import canonical
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.ir.ops.depth import chosen
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.program import Program, steps
from elision.ir.tokens import Tokens
from elision.passes import FirstRouter, from_text
from elision.passes.calibration import Text
from elision.passes.layers.depth import without
from elision.passes.pipeline import run, transform
from elision.runtime.session import Session
from elision.runtime.speculation import drafting_of
from tests.passes.calibrating import Weights, ids
from tests.passes.deep import LAYERS, compiled
from tests.passes.poisoned import rounds
from tests.passes.small import ragged

METHOD = "first-router:share=0.34"


def model(*others: str, target: str = "reference", threshold: float = 0.5) -> elision.Model:
    return compiled(f"{METHOD},threshold={threshold}", *others, target=target, text=True)


def depths(model: elision.Model, prompts: list[list[int]]) -> list[int]:
    session = Session(model._interpreter, len(prompts), 60)
    with torch.inference_mode():
        session.prefill(prompts)
    return session.depth


def prompts() -> list[list[int]]:
    return torch.randint(0, 64, (8, 9), generator=torch.Generator().manual_seed(5)).tolist()  # type: ignore[no-any-return]


def test_what_is_chosen_and_how() -> None:
    """Layers that do little work come first, and a prompt's own choice is between none and all of them."""
    found = from_text(model().program.applied[-1])
    assert isinstance(found, FirstRouter) and 1 <= len(found.layers) <= 4 and len(steps(model().program)) == len(found.layers) + 1
    program, weights = tiny_llama(layers=LAYERS)
    for name in weights:
        if name in ("3.o", "3.down"):
            weights[name] = weights[name] * 0.01
    made, fitted = transform(program, weights, ["first-router:share=0.17"], Text(ids()))
    step = from_text(made.applied[-1])
    assert isinstance(step, FirstRouter) and step.layers == (3,)
    assert float(fitted["router.3.bias"]) < 0  # never worth it, whatever the prompt


def test_a_choice_is_the_longest_beginning() -> None:
    means = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.6, 0.1], [0.7, 0.1, 0.1]])
    assert chosen(means, 0.5) == [3, 1, 0] and chosen(means, 0.0) == [0, 0, 0] and chosen(means, 1.1) == [3, 3, 3]


def test_a_higher_threshold_leaves_out_more() -> None:
    found = [depths(model(threshold=t), prompts()) for t in (0.0, 0.4, 0.5, 0.6, 1.1)]
    assert set(found[0]) == {0} and set(found[-1]) == {len(steps(model().program)) - 1}
    assert all(a <= b for few, many in zip(found, found[1:], strict=False) for a, b in zip(few, many, strict=True))


def test_the_identity() -> None:
    said = compiled().generate(*ragged(), max_new_tokens=30)
    assert torch.equal(model(threshold=0.0).generate(*ragged(), max_new_tokens=30), said)
    assert canonical(compiled("first-router").program) == canonical(compiled().program)
    assert not torch.equal(model(threshold=1.1).generate(*ragged(), max_new_tokens=30), said)


def oracle(program: Program, weights: Weights, layers: tuple[int, ...], prompt: list[int], new: int) -> list[int]:
    """The whole prompt's caches, then a step that simply lacks the layers."""
    program = run(program, [])
    whole = elision.Model(program, weights, tokenizer=None, defaults={}, coverage={}, max_context=160)
    session = Session(whole._interpreter, 1, 60)
    graph = without(program, program.entries["step"], layers, "short")
    with torch.inference_mode():
        said = [int(session.prefill([prompt])[0].argmax())]
        for i in range(new - 1):
            at = Tokens(torch.tensor([0]), torch.tensor([len(prompt) + i]), 1, torch.tensor([-1]), torch.tensor([1]))
            logits = session._run(graph, {"ids": torch.tensor([said[-1]])}, at)[0]
            for store in session._stores.values():
                if int(store.index["node_live"].sum()):
                    store.commit([[0]])
            said.append(int(logits[0].argmax()))
    return said


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_rows_run_the_layers_that_their_prompts_chose(target: str) -> None:
    """Rows of one batch have depths of their own; each continues as a step that lacks these layers would."""
    routed = model(target=target, threshold=0.52)
    layers = from_text(routed.program.applied[-1]).layers  # type: ignore[attr-defined]
    found = depths(routed, prompts())
    assert len(set(found)) > 1
    said = routed.generate(torch.tensor(prompts()), max_new_tokens=30)
    program, weights = tiny_llama(layers=LAYERS, dtype="f32")
    weights["embed"] = weights["embed"] * 0.12
    for prompt, depth, row in zip(prompts(), found, said.tolist(), strict=True):
        assert row[9:] == oracle(program, weights, layers[:depth], prompt, 30)


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_speculation_changes_nothing(target: str) -> None:
    drafted = model("token-recycling:nodes=20", "pain-trie:nodes=20", target=target)
    fresh = drafting_of(drafted._interpreter, "")
    assert isinstance(fresh, Drafting)
    drafted.drafting = Drafting(fresh.drafters, Always(12))
    said = drafted.generate(*ragged(), max_new_tokens=40)
    assert torch.equal(said, model(target=target).generate(*ragged(), max_new_tokens=40))
    assert drafted.stats is not None and drafted.stats.accepted > 10


@pytest.mark.parametrize("others", [(), ("token-recycling:nodes=20",)])
@torch.inference_mode()
def test_nothing_reads_what_was_not_written(others: tuple[str, ...]) -> None:
    first, second = (rounds(model(*others, threshold=0.52), poison) for poison in (1e4, -7.5))
    assert len(first) > 10 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_does_not_compose_is_named() -> None:
    program, _ = tiny_llama(layers=LAYERS)
    text = "first-router:share=0.34,layers=3+4"
    for other in ("h2o:budget=24,recent=8", "skipdecode:most=6,least=2", "layer-skip-draft:layers=1"):
        with pytest.raises(IllegalProgram, match="validity"):
            run(program, [text, other])
    for bad, says in ((METHOD, "chooses on text"), (f"{METHOD},layers=9", "no layer 9"), ("first-router:share=2.0", "share")):
        with pytest.raises(BadInput, match=says):
            run(program, [bad])


def test_as_text_and_in_an_artefact(tmp_path: Path) -> None:
    routed = model("int8:group=32", target="cpu")
    assert parse_program(print_program(routed.program)) == routed.program
    routed.save(tmp_path / "model.elision")
    again = elision.load(tmp_path / "model.elision")
    assert torch.equal(again.generate(*ragged(), max_new_tokens=30), routed.generate(*ragged(), max_new_tokens=30))
