"""What became of the graphs that Dynamo handed over."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class GraphReport:
    """One graph. ``runs``: ``native``, ``interpreter``, ``eager`` or ``inductor`` (``waiting`` before its first call);
    ``reason``: why it was not raised; ``notes``: what else differs; ``calls``: in all, the first included, which is always
    eager; ``fallen``: of those after it, which ran as captured, by reason."""

    module: str
    operators: int
    runs: str = "waiting"
    reason: str = ""
    notes: list[str] = field(default_factory=list)
    calls: int = 0
    fallen: Counter[str] = field(default_factory=Counter)
    coverage: dict[str, Any] = field(default_factory=dict)


GRAPHS: list[GraphReport] = []


def report() -> dict[str, Any]:
    """``graphs``: a `GraphReport` for every graph since the last ``torch._dynamo.reset()``; ``graph_breaks``: Dynamo's own count
    of the places where it had to leave a graph, by reason."""
    from torch._dynamo.utils import counters

    return {"graphs": list(GRAPHS), "graph_breaks": dict(counters["graph_break"])}
