"""Order the passes by what they declare, apply them, and verify the program after every one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from elision.errors import BadInput
from elision.ir.blocks import Stored
from elision.ir.program import QUALITIES, Program, Weights
from elision.ir.retype import convert
from elision.ir.verifier import verify
from elision.passes.base import CHANGES, REGISTRY, Pass, from_text
from elision.passes.calibration import Calibrated, Choosing, Text
from elision.passes.speculate.model import ModelPass
from elision.passes.timing import LATER, Clock, Timed

log = logging.getLogger("elision")


def resolve(passes: Iterable[str | Pass]) -> list[Pass]:
    """Text or Pass objects to Pass objects, in the order in which they run: by `CHANGES`, then as given."""
    if isinstance(passes, str):
        raise BadInput(f"passes={passes!r}: expected a list of passes, as in passes=[{passes!r}]")
    found: list[Pass] = []
    for item in passes:
        if not isinstance(item, str | Pass):
            raise BadInput(f"passes: expected text or a Pass, got {item!r}")
        found.append(from_text(item) if isinstance(item, str) else item)
    return sorted(found, key=lambda p: CHANGES.index(p.changes))


def run(program: Program, passes: Iterable[str | Pass]) -> Program:
    """The program with the passes applied. Raises IllegalProgram at the first pass that breaks a rule."""
    return list(steps(program, passes))[-1][1]


def transform(
    program: Program,
    weights: Weights,
    passes: Iterable[str | Pass],
    text: Text,
    stored: Mapping[str, Stored] | None = None,
    clock: Clock | None = None,
) -> tuple[Program, dict[str, torch.Tensor]]:
    """As `run`, with the tensors of the program's weights. ``text``: for passes that calibrate; ``stored``: the blocks that the
    weights have in the model's file; ``clock``: times steps for passes that choose by them. Raises BadInput for weights that
    cannot be stored as asked for, and for text given to passes of which none calibrates."""
    chosen = resolve(passes)
    if text.given is not None and not any(isinstance(step, Calibrated | Choosing) for step in chosen):
        able = ", ".join(sorted(name for name, cls in REGISTRY.items() if issubclass(cls, Calibrated | Choosing)))
        raise BadInput(f"calibration is given, but no pass calibrates; those that do are {able}")
    params, before = program.params, program  # the types of the tensors at hand, and the program before each step

    def later(step: Pass) -> list[Pass]:
        rest = chosen[chosen.index(step) + 1 :]
        return [each for each in rest if each.changes in LATER and not isinstance(each, Choosing)]

    def settle(step: Pass, before: Program) -> Pass:
        nonlocal weights, params
        if isinstance(step, Timed) and clock is not None and "step" in before.entries:
            log.info("timing steps for %s", step.text())
            return step.timed(before, lambda programs, contexts: clock([run(p, later(step)) for p in programs], contexts))
        if not isinstance(step, Choosing):
            return step
        weights, params = convert(weights, params, before.params, stored), before.params
        return step.choose(before, weights, text)

    for step, after in steps(program, chosen, settle):
        if isinstance(step, Calibrated):
            weights = convert(weights, params, before.params, stored)
            log.info("calibrating %s", step.text())
            with named(step):
                changed = step.calibrate(before, weights, text)
            params, weights = after.params, {name: (changed if name in changed else weights)[name] for name in after.params}
        if isinstance(step, ModelPass) and (brought := step.brought(before)):
            weights, params = {**weights, **brought}, {**params, **{name: after.params[name] for name in brought}}
        before = after
    return before, convert(weights, params, before.params, stored)


@contextmanager
def named(step: Pass) -> Iterator[None]:
    """A refusal from what a pass builds on (a type, an op) is told in the name of the pass."""
    try:
        yield
    except BadInput as err:
        if str(err).removeprefix("pass ").startswith(step.name):
            raise
        raise type(err)(f"{step.name}: {err}") from err


def steps(
    program: Program, passes: Iterable[str | Pass], settle: Callable[[Pass, Program], Pass] = lambda step, before: step
) -> Iterator[tuple[Pass, Program]]:
    """Each pass, as ``settle`` gives it for the program before it, with the program after it, cleaned last."""
    from elision.passes.clean import Clean

    done = program
    for given in [*resolve(passes), Clean()]:
        with named(given):
            step = settle(given, done)
            done = done.copy()
            step.apply(done)
        if not isinstance(step, Clean):
            log.info("pass %s", step.text())
            done.applied = (*done.applied, step.text())
            done.quality = max(done.quality, step.quality, key=QUALITIES.index)
        verify(done, by=step.text())
        yield step, done
