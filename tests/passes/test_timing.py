"""Passes that choose by the time of a step: what they choose where times are known, and that this machine's are measured."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from programs import tiny_llama

import elision
from elision.codegen.cpu.compile import compile_program
from elision.errors import BadInput
from elision.ir.canonical import canonical
from elision.ir.program import Program
from elision.passes.calibration import Text
from elision.passes.pipeline import run, transform
from elision.passes.timing import Clock
from elision.runtime.clock import decode_seconds, made_up
from tests.passes.small import tiny

LAYERS = 12


def machine(rest: float, layer: float, entry: float = 0.0, asked: list[Sequence[Program]] | None = None) -> Clock:
    """A machine on which a step takes ``rest + layers (layer + entry context)`` seconds."""

    def clock(programs: Sequence[Program], contexts: Sequence[int]) -> list[list[float]]:
        if asked is not None:
            asked.append(programs)
        return [[rest + len(p.layers) * (layer + entry * c) for c in contexts] for p in programs]

    return clock


def applied(clock: Clock | None, *passes: str) -> str:
    program, weights = tiny_llama(layers=LAYERS)
    return transform(program, weights, passes, Text(), clock=clock)[0].applied[-1]


@pytest.mark.parametrize(("rest", "keep"), [(0.0, 6), (6.0, 3), (2.0, 5)])
def test_unified_skip_hits_its_speed_up(rest: float, keep: int) -> None:
    """What is not in layers stays, so the larger it is, the fewer layers may."""
    assert applied(machine(rest, 1.0), "unified-skip:speedup=2") == f"unified-skip:speedup=2.0,keep={keep}"
    program, _ = tiny_llama(layers=LAYERS)
    again = run(program, [f"unified-skip:speedup=2.0,keep={keep}"])
    assert len(again.layers) == keep and canonical(again) == canonical(run(program, [f"unified-skip:keep={keep}"]))


@pytest.mark.parametrize("entry", [0.0, 0.05])
@pytest.mark.parametrize("speedup", [1.1, 1.5, 2.0, 3.0])
def test_skipdecode_hits_its_speed_up(speedup: float, entry: float) -> None:
    """Layers weigh more the longer the text is; that is when few of them run."""
    text = applied(machine(1.0, 1.0, entry), f"skipdecode:speedup={speedup},length=60,stages=6")
    most, least = (int(part.partition("=")[2]) for part in text.split(",")[-2:])
    assert text.split(",")[-2].startswith("most") and most >= least
    plain = depth = 0.0
    for stage in range(6):
        layers = most - round((most - least) * stage / 5)
        for position in range(10 * stage, 10 * stage + 10):
            plain += 1 + LAYERS * (1 + entry * position)
            depth += 1 + layers * (1 + entry * position)
    assert plain / depth == pytest.approx(speedup, rel=0.05)


def test_what_was_chosen_or_asks_for_nothing_is_not_timed() -> None:
    asked: list[Sequence[Program]] = []
    for text in ("unified-skip", "unified-skip:speedup=2.0,keep=3", "skipdecode", "skipdecode:speedup=2.0,most=12,least=3"):
        assert applied(machine(1, 1, asked=asked), text) == text
    assert not asked
    assert applied(None, "unified-skip:speedup=2") == "unified-skip:speedup=2.0"  # by bytes, in `apply`


def test_steps_are_timed_as_they_will_be() -> None:
    """With the weights and caches that later passes give them."""
    asked: list[Sequence[Program]] = []
    clock = machine(1, 1, asked=asked)
    program, weights = tiny_llama(layers=LAYERS, dtype="f32")
    transform(program, weights, ["unified-skip:speedup=2", "int8", "kv-quant"], Text(), clock=clock)
    ((whole, part),) = asked
    assert [len(p.layers) for p in (whole, part)] == [LAYERS, LAYERS // 2]
    for timed in (whole, part):
        assert timed.applied[-2:] == ("kv-quant", "int8")


def test_impossible_speed_ups_are_refused() -> None:
    for text in ("unified-skip:speedup=5", "skipdecode:speedup=5"):
        with pytest.raises(BadInput, match="speedup=5.0; expected 1 to 3.75"):
            applied(machine(3.0, 1.0), text)


def test_a_step_of_this_machine() -> None:
    """More layers take longer, whichever is asked for first, on weights of ordinary size."""
    models = []
    for layers in (2, 16):
        program = run(tiny_llama(layers=layers, dtype="f32")[0], [])
        code, given = compile_program(program), made_up(program)
        models.append(elision.Model(program, given, tokenizer=None, defaults={}, coverage={}, max_context=160, native=code))
    few, many = (m._interpreter for m in models)
    for order in ((few, many), (many, few)):
        seconds = decode_seconds(order, (4, 40))
        assert [len(row) for row in seconds] == [2, 2] and all(x > 0 for row in seconds for x in row)
        short, long = seconds if order[0] is few else seconds[::-1]
        assert max(short) < min(long)
    assert torch.isfinite(models[0](input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_compiling_times_native_code() -> None:
    """`elision.compile` gives passes this machine's clock; without native code they count bytes."""
    source = tiny(num_hidden_layers=4)
    for target, says in (("cpu", r"unified-skip:speedup=1\.1,keep=[1-4]"), ("reference", r"unified-skip:speedup=1\.1")):
        model = elision.compile(source, passes=["unified-skip:speedup=1.1"], target=target)
        assert re.fullmatch(says, model.program.applied[-1])
        assert len(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, eos_token_id=[])[0]) == 7
