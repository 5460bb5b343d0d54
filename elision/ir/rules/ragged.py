"""Rule ragged: lengths that can differ between sequences are declared.

Example: a round that verifies drafts of a batch. Rows accept different counts, so a cache with ragged=False, one length for all
rows, would be wrong for all but one.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.rules.view import View
from elision.ir.states import KV


def ragged(view: View) -> Iterator[IllegalProgram]:
    """No cache with ``ragged=False`` where a round verifies, or in a tick (rows tick by their own positions)."""
    graph = view.program.round
    apart = {}
    if graph is not None and any(v.op == "verify" for v in graph.values):
        apart[graph.name] = "rows accept different numbers of drafted tokens"
    apart |= {t.graph.name: "rows reach the tick at different times" for t in view.program.ticks}
    for name, because in apart.items():
        for state in view.runs[name].inputs:
            if isinstance(state.type, KV) and not state.type.ragged:
                yield IllegalProgram(
                    "ragged",
                    f"{view.runs[name].names[state]} has one length for all sequences",
                    sides=f"{name}: a cache with ragged=False",
                    because=because,
                    help="give the cache ragged=True",
                )
