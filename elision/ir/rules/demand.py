"""Rule demand: a result of attention is asked only of a kernel that gives it.

Example: ``attend(q, kv, results=('mass',))``, the column sums of the probabilities, on a target whose flash kernel never forms
them.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.rules.view import View


def demand(view: View) -> Iterator[IllegalProgram]:
    """The ``results`` of every `attend` are among the features of the target's kernel."""
    given = view.kernels.get("attend", frozenset())
    for site in view.once("attend"):
        for result in site.value.attr("results", ()):
            if result not in given:
                yield IllegalProgram(
                    "demand",
                    f"attend is asked for {result}, which its kernel does not give",
                    sides=f"{site.where}: attend with results {', '.join(site.value.attr('results'))}",
                    because=f"the kernel for attend on this target gives {', '.join(sorted(given)) or 'its output only'}",
                    help="compute it in a second light pass from lse, or from an observation window of queries",
                )
