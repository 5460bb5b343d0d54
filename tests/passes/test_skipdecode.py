"""skipdecode: tokens run fewer layers the further a text goes on, and nothing reads what was not written."""

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
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.program import Program, running, steps
from elision.ir.value import Builder, Value
from elision.passes.calibration import run_score
from elision.passes.pipeline import run
from elision.runtime.speculation import drafting_of
from tests.passes.deep import LAYERS, compiled
from tests.passes.poisoned import rounds
from tests.passes.small import ragged

#: 6 layers up to position 8, then 5, 4, 3, and 2 from position 32 on.
METHOD = "skipdecode:most=6,least=2,length=40,stages=5"


def tokens(model: elision.Model, new: int = 60) -> torch.Tensor:
    found = model.generate(*ragged(), max_new_tokens=new)
    assert isinstance(found, torch.Tensor)
    return found


def test_the_table() -> None:
    """Depth never grows, and the average over the length is the one asked for."""
    program = compiled(METHOD).program
    value = running(program.round)  # type: ignore[arg-type]
    assert value.attr("until") == (8, 16, 24, 32) and steps(program) == ("step", "step_1", "step_2", "step_3", "step_4")
    ran = [{v.attr("label").partition(".")[0] for v in program.entries[name].calls()} for name in steps(program)]
    assert [sorted(map(int, r)) for r in ran] == [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 3, 4, 5], [0, 4, 5], [0, 5]]
    kinds = [type.present.kind for type in program.states.values()]  # type: ignore[union-attr]
    assert kinds == ["all", "nested", "nested", "nested", "nested", "all"]


def test_fewer_from_the_start() -> None:
    """Layers that no token runs are gone, with their weights."""
    program = compiled("skipdecode:most=4,least=2,length=40,stages=3").program
    assert list(program.layers) == [0, 3, 4, 5] and len(program.states) == 4
    assert [len({v.attr("label")[0] for v in program.entries[n].calls()}) for n in steps(program)] == [4, 3, 2]


def select(program: Program, until: dict[int, int]) -> Program:
    """The oracle: every layer computes every token, and each token takes the result of the layers that are its own."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
        layer = int(v.attr("label").partition(".")[0]) if v.op == "call" else -1
        if layer not in until:
            return None
        found = b.add_with("call", args, dict(v.attrs), None)
        results = b.items(found) if isinstance(found.type, tuple) else [found]
        index = b.add("before", args[0], until=until[layer], axis="taken")
        chosen = b.add("lift", b.add("restrict", results[0], index), args[0], index)
        return (chosen, *results[1:]) if isinstance(found.type, tuple) else chosen

    program = program.copy()
    program.rewrite(rule, "score")
    return program


def test_the_forward_is_that_of_computing_all_and_choosing() -> None:
    program, weights = tiny_llama(layers=LAYERS)
    ids = torch.randint(0, 64, (2, 45), generator=torch.Generator().manual_seed(1))
    want = run_score(select(program, {1: 8, 2: 16, 3: 24, 4: 32}), weights, list(ids))[0]
    found = run_score(run(program, [METHOD]), weights, list(ids))[0]
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    plain = run_score(program, weights, list(ids))[0]
    torch.testing.assert_close(found[:8], plain[:8])
    assert float((found[8:45] - plain[8:45]).abs().max()) > 0.1


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_generation_is_its_own_forward(target: str) -> None:
    """After a prompt of one token every token is a generated one."""
    model = compiled(METHOD, target=target)
    said = model.generate(torch.tensor([[5], [9]]), max_new_tokens=60)
    logits = model(said).logits
    assert torch.equal(logits[:, :-1].argmax(-1), said[:, 1:])
    assert not torch.equal(said, compiled().generate(torch.tensor([[5], [9]]), max_new_tokens=60))


def test_its_forward_in_and_out_of_inference_mode() -> None:
    """Rows of the host write to memory that calls of both kinds share."""
    model, ids = compiled(METHOD, target="cpu"), torch.arange(20)[None]
    with torch.inference_mode():
        first = model(ids).logits
    assert torch.equal(model(ids).logits, first)


def test_native_rows_of_different_depths() -> None:
    """Rows of different lengths are at different depths in one round; a row's tokens do not depend on the others."""
    model = compiled(METHOD, target="cpu")
    assert model.native is not None and not any(model.native.hosts[name] for name in steps(model.program))
    together = tokens(model)
    assert torch.equal(together, tokens(compiled(METHOD)))
    ids, mask = ragged()
    for row in range(4):
        alone = model.generate(ids[row : row + 1, ids.shape[1] - int(mask[row].sum()) :], max_new_tokens=60)
        assert torch.equal(alone[0, -60:], together[row, -60:])


def test_the_identity() -> None:
    plain, same = compiled().program, compiled("skipdecode").program
    assert canonical(plain) == canonical(same) and same.applied[-1] == "skipdecode"


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_speculation_changes_nothing(target: str) -> None:
    """A round of drafts ends where its step does, so tokens and caches are those of decoding one by one."""
    model = compiled(METHOD, "token-recycling:nodes=20", "pain-trie:nodes=20", target=target)
    fresh = drafting_of(model._interpreter, "")
    assert isinstance(fresh, Drafting)
    model.drafting = Drafting(fresh.drafters, Always(12))
    assert torch.equal(tokens(model), tokens(compiled(METHOD, target=target)))
    assert model.stats is not None and model.stats.accepted > 20 and model.stats.rounds < 55


SOME = METHOD.replace("6", "5")
OTHERS = [("int8:group=32", "a8"), ("bf16",), ("int4:group=32",), ("skip-layers:layers=1",), ("kv-quant",)]


@pytest.mark.nightly
@pytest.mark.parametrize("others", [*OTHERS, ("streaming-llm:window=21,sinks=3",)])
def test_with_other_methods(others: tuple[str, ...]) -> None:
    assert torch.equal(tokens(compiled(SOME, *others, target="cpu")), tokens(compiled(SOME, *others)))


def test_with_all_of_them() -> None:
    others = ("skip-layers:layers=1", "int8:group=32", "a8", "streaming-llm:window=21,sinks=3", "kv-quant")
    assert torch.equal(tokens(compiled(SOME, *others, target="cpu")), tokens(compiled(SOME, *others)))


@pytest.mark.parametrize("passes", [(METHOD,), (METHOD, "token-recycling:nodes=20")])
@torch.inference_mode()
def test_nothing_reads_what_was_not_written(passes: tuple[str, ...]) -> None:
    """Caches filled with one finite number or with another: the same tokens, and the same logits to the bit."""
    first, second = (rounds(compiled(*passes), poison) for poison in (1e4, -7.5))
    assert len(first) > 10 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_does_not_compose_is_named() -> None:
    program, _ = tiny_llama(layers=LAYERS)
    for other in ("layer-skip-draft:layers=1", "h2o:budget=24,recent=8,sinks=1"):
        with pytest.raises(IllegalProgram, match="validity"):
            run(program, [METHOD, other])
    for text in ("speedup=0.5", "most=7,least=2", "most=4,least=5", "stages=1,most=4"):
        with pytest.raises(BadInput, match="skipdecode"):
            run(program, [f"skipdecode:{text}"])


def test_as_text_and_in_an_artefact(tmp_path: Path) -> None:
    model = compiled(METHOD, target="cpu")
    assert parse_program(print_program(model.program)) == model.program
    model.save(tmp_path / "model.elision")
    assert torch.equal(tokens(elision.load(tmp_path / "model.elision")), tokens(model))
