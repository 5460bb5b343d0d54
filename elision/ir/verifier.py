"""The verifier: a list of legality rules, run after every pass."""

from __future__ import annotations

from collections.abc import Callable

from elision.errors import IllegalProgram
from elision.ir.program import Program

RULES: list[Callable[[Program], list[IllegalProgram]]] = []


def check(program: Program) -> list[IllegalProgram]:
    """Every violation of a legality rule."""
    return [found for rule in RULES for found in rule(program)]


def verify(program: Program, by: str = "") -> None:
    """Raise the first violation."""
    for found in check(program):
        raise found
