"""Which passes cannot act on a program, and why: found by trying each on a copy of it."""

from __future__ import annotations

from elision.errors import BadInput
from elision.ir.program import Program
from elision.ir.verifier import check
from elision.passes.base import REGISTRY, Pass


def unavailable(program: Program) -> dict[str, str]:
    """For every registered pass that cannot act on the program, its least setting (`Pass.example`) as text, and the reason: what
    the pass itself says, or the first legality rule that it would break. What has been applied already is left out."""
    applied = {text.partition(":")[0] for text in program.applied}
    found: dict[str, str] = {}
    for name, cls in sorted(REGISTRY.items()):
        if name not in applied:
            step = cls.example(program)
            if reason := refusal(step, program):
                found[step.text()] = reason
    return found


def refusal(step: Pass, program: Program) -> str | None:
    """Why the pass cannot be applied to the program; None if it can."""
    tried = program.copy()
    try:
        step.apply(tried)
    except BadInput as err:
        return str(err)
    broken = check(tried)
    return f"rule {broken[0].rule}: {broken[0].what}" if broken else None
