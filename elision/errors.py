"""The errors that Elision raises. Every one says what was given, what was expected and what to do."""

from __future__ import annotations


class ElisionError(Exception):
    """Base of every error that Elision raises on purpose. ``exit_status`` is the CLI's exit status."""

    exit_status = 2


class BadInput(ElisionError, ValueError):
    """The caller gave something that cannot be used: a pass name, a prompt, a file, an argument."""


class UnsupportedModel(BadInput):
    """The model is not one that the frontend can raise (for example: it has no attention)."""


class ArtefactError(ElisionError):
    """The artefact is damaged, foreign, of another version, or has no code for this device."""


class IllegalProgram(ElisionError):
    """A program breaks a legality rule. Printed in four lines: rule, cause, both sides, help.

    ``rule`` is the rule's name; ``what`` the fact; ``written_by`` and ``read_by`` the two passes or sites;
    ``because`` the cause; ``help`` the repair.
    """

    exit_status = 1

    def __init__(self, rule: str, what: str, *, sides: str, because: str, help: str) -> None:
        self.rule, self.what, self.sides, self.because, self.help = rule, what, sides, because, help
        super().__init__(
            f"error[{rule}]: {what}\n  written by  {sides}\n  because     {because}\n  help        {help}"
        )
