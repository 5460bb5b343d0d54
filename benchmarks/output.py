"""Where the markdown of a benchmark goes."""

from __future__ import annotations

from pathlib import Path


def give(text: str, path: Path | None) -> None:
    """Into the file, or to standard output."""
    if path:
        path.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
