"""The command line: one verb per intent (`elision --help`)."""

from elision.cli.app import main

__all__ = ["main"]
