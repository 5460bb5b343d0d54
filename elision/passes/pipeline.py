"""Order the passes by what they declare, apply them, and verify the program after every one."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from elision.errors import BadInput
from elision.ir.program import QUALITIES, Program
from elision.ir.verifier import verify
from elision.passes.base import CHANGES, Pass, from_text

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
    from elision.passes.clean import Clean

    done = program.copy()
    for step in [*resolve(passes), Clean()]:
        step.apply(done)
        if not isinstance(step, Clean):
            log.info("pass %s", step.text())
            done.applied = (*done.applied, step.text())
            done.quality = max(done.quality, step.quality, key=QUALITIES.index)
        verify(done, by=step.text())
    return done
