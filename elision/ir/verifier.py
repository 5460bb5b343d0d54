"""The verifier: a list of legality rules, one file each in `elision.ir.rules`, run after every pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from elision.errors import IllegalProgram
from elision.ir.program import Program
from elision.ir.rules.address import address
from elision.ir.rules.affine import affine
from elision.ir.rules.axis import axis, verified
from elision.ir.rules.demand import demand
from elision.ir.rules.encoding import encoding
from elision.ir.rules.quality import quality
from elision.ir.rules.ragged import ragged
from elision.ir.rules.retract import retract
from elision.ir.rules.rotation import rotation
from elision.ir.rules.typed import typed
from elision.ir.rules.validity import validity
from elision.ir.rules.view import REFERENCE, Rule, View

#: In the order in which they are checked: first what the others rely on to follow states and calls.
RULES: list[Rule] = [typed, affine, encoding, retract, address, demand, axis, validity, rotation, ragged, quality]
FORM: list[Rule] = [verified, typed, affine]  # `verified` is the part of `axis` that a round cannot be built against


def check(program: Program, kernels: Mapping[str, frozenset[str]] = REFERENCE) -> list[IllegalProgram]:
    """Every violation of a legality rule (of those of form alone, if there is one). ``kernels``: by op, what the target's
    kernel can do (see `REFERENCE`)."""
    return list(_violations(View(program, kernels)))


def _violations(view: View) -> Iterator[IllegalProgram]:
    broken = False
    for rule in FORM:
        for found in rule(view):
            broken = True
            yield found
    if not broken:
        for rule in RULES:
            if rule not in FORM:
                yield from rule(view)


def verify(program: Program, by: str = "", kernels: Mapping[str, frozenset[str]] = REFERENCE) -> None:
    """Raise the first violation, if there is one, naming the pass ``by`` that made it and those applied before."""
    found = next(_violations(View(program, kernels)), None)
    if found is None:
        return
    if by:
        before = [text for text in program.applied if text != by]
        after = f" (after {', '.join(before)})" if before else ""
        sides = f"{by}{after}; {found.sides}"
        found = IllegalProgram(found.rule, found.what, sides=sides, because=found.because, help=found.help)
    raise found
