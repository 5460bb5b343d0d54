"""What was raised and what stayed opaque, and what that costs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from elision.frontend.raising import Raised
from elision.ir.program import Program


def coverage(raised: Raised, program: Program) -> dict[str, Any]:
    """Counts per run of the model: ``sites`` by op, ``opaque`` operators by name, and the rows of each entry that are
    ``aten``."""
    sites: Counter[str] = Counter()
    opaque: Counter[str] = Counter()
    score = raised.program.entries["score"]
    for value in score.values:
        if value.op == "call":
            template = value.attr("target")
            sites.update(v.op for v in raised.program.templates[template].values if v.op not in ("input", "item"))
            opaque.update(raised.opaque.get(template, ()))
        elif value.op not in ("input", "param", "item"):
            sites[value.op] += 1
    opaque.update(raised.opaque.get("score", ()))
    return {"sites": dict(sorted(sites.items())), "opaque": dict(sorted(opaque.items())), "entries": aten_rows(program)}


def aten_rows(program: Program) -> dict[str, int]:
    """How many opaque ops each entry runs."""

    def count(name: str) -> int:
        graph = program.targets[name]
        return sum(v.op == "aten" for v in graph.values) + sum(count(v.attr("target")) for v in graph.calls())

    return {name: count(name) for name in program.entries}
