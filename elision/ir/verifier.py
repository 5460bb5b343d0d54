"""The verifier: a list of legality rules, one file each in `elision.ir.rules`, run after every pass."""

from __future__ import annotations

from collections.abc import Mapping

from elision.errors import IllegalProgram
from elision.ir.program import Program
from elision.ir.rules.address import address
from elision.ir.rules.affine import affine
from elision.ir.rules.axis import axis
from elision.ir.rules.demand import demand
from elision.ir.rules.encoding import encoding
from elision.ir.rules.quality import quality
from elision.ir.rules.ragged import ragged
from elision.ir.rules.retract import retract
from elision.ir.rules.rotation import rotation
from elision.ir.rules.typed import typed
from elision.ir.rules.validity import validity
from elision.ir.rules.view import REFERENCE, Rule, View

#: In the order in which they are checked: first the two of form, which the others rely on to follow states and calls.
FORM: list[Rule] = [typed, affine]
RULES: list[Rule] = [*FORM, encoding, retract, address, demand, axis, validity, rotation, ragged, quality]


def check(program: Program, kernels: Mapping[str, frozenset[str]] = REFERENCE) -> list[IllegalProgram]:
    """Every violation of a legality rule (of those of form alone, if there is one). ``kernels``: by op, what the target's
    kernel can do (see `REFERENCE`)."""
    view = View(program, kernels)
    broken = [found for rule in FORM for found in rule(view)]
    return broken or [found for rule in RULES for found in rule(view)]


def verify(program: Program, by: str = "", kernels: Mapping[str, frozenset[str]] = REFERENCE) -> None:
    """Raise the first violation, if there is one, naming the pass ``by`` that made it and those applied before."""
    view = View(program, kernels)
    found = next((found for rule in RULES for found in rule(view)), None)
    if found is None:
        return
    if by:
        before = [text for text in program.applied if text != by]
        after = f" (after {', '.join(before)})" if before else ""
        sides = f"{by}{after}; {found.sides}"
        found = IllegalProgram(found.rule, found.what, sides=sides, because=found.because, help=found.help)
    raise found
