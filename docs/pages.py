"""The pages of docs/passes, from the docstrings of the passes: `python docs/pages.py` writes them, a test compares them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import get_type_hints

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))

from elision.passes import REGISTRY, Pass  # noqa: E402
from elision.passes.base import CHANGES, kind_of, shown  # noqa: E402

CORE = "What every program gets: caches and the loop of generation at the beginning, tidying up at the end."


def pages() -> dict[str, str]:
    """The pages by file name, and README.md with a line for each."""
    found: dict[str, list[type[Pass]]] = {}
    for name in sorted(REGISTRY):
        if REGISTRY[name].__module__.startswith("elision."):
            found.setdefault(REGISTRY[name].family, []).append(REGISTRY[name])
    made = {f"{family}.md": page(family, found[family]) for family in sorted(found)}
    lines = [f"- [{family}]({family}.md): {', '.join(f'`{p.name}`' for p in found[family])}" for family in sorted(found)]
    head = "# The passes\n\nOne page for each family, made from the docstrings by `python docs/pages.py`.\n\n"
    return made | {"README.md": head + "\n".join(lines) + "\n"}


def page(family: str, passes: list[type[Pass]]) -> str:
    about = CORE if family == "core" else inspect.getdoc(importlib.import_module(f"elision.passes.{family}"))
    drawn = (HERE / "figures" / f"{family}.svg").exists()
    picture = [f"![what methods gain and cost, by `benchmarks/run.py`](../figures/{family}.svg)"] if drawn else []
    return "\n\n".join([f"# {family}", prose(about or ""), *picture, *map(section, passes)]) + "\n"


def section(cls: type[Pass]) -> str:
    """One pass: its method, its text, what it says of itself, its fields."""
    method = (inspect.getdoc(inspect.getmodule(cls)) or "").split("\n\n")[0]
    facts = f"Quality: {cls.quality}. Changes {cls.changes} ({CHANGES.index(cls.changes) + 1} of {len(CHANGES)} in the pipeline)."
    parts = [f"## `{cls.name}`", f"*{prose(method)}*", facts, prose(inspect.getdoc(cls) or "")]
    hints = get_type_hints(cls)
    rows = [
        f"| `{f.name}` | {kind_of(hints[f.name]).replace(' |', ' or')} | {_default(f.default)} |" for f in dataclasses.fields(cls)
    ]
    if rows:
        parts.append("\n".join(["| field | type | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _default(value: object) -> str:
    if value is dataclasses.MISSING:
        return "must be given"
    return f"`{shown(value)}`" if shown(value) else "none"


def prose(text: str) -> str:
    """Docstrings are reStructuredText as far as ``literals`` go."""
    return re.sub(r"``([^`]+)``", r"`\1`", text)


if __name__ == "__main__":
    for name, text in pages().items():
        (HERE / "passes" / name).write_text(text, encoding="utf-8")
