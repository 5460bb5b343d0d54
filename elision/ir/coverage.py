"""The coverage report, in plain data: what of a model was raised, and what is left to torch as opaque operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

from elision.ir.cost import cost, total
from elision.ir.op import Sizes
from elision.ir.program import Program
from elision.ir.walk import CONTROL, sites

#: Tokens of one call by entry, for one row; any other entry has as many as `score`.
PHASES = {"prefill": 512, "step": 1, "score": 512}


def coverage(raised: Program, program: Program) -> dict[str, Any]:
    """For one run of the model as it was raised, ``sites`` by op and ``opaque`` operators by name; for
    the program that was compiled from it, what `left` says of each entry."""
    plumbing = (*CONTROL, "pad", "unpad")
    found = Counter(s.value.op for s in sites(raised, raised.entries["score"]) if s.value.op not in plumbing)
    return {"sites": dict(sorted(found.items())), "opaque": opaque(raised, "score"), **left(program)}


def is_report(found: Any) -> bool:
    """Whether something has the form of a report (one is read back from an artefact)."""
    if not isinstance(found, dict) or set(found) != {"sites", "opaque", "entries", "left", "flops"}:
        return False
    if not all(isinstance(part, dict) for part in found.values()) or not found["entries"].keys() == found["left"].keys():
        return False
    counts = [found["sites"], found["opaque"], found["entries"], *found["left"].values()]
    shares = found["flops"]
    return (
        all(isinstance(c, dict) and all(type(n) is int and n >= 0 for n in c.values()) for c in counts)
        and shares.keys() == found["entries"].keys()
        and all(isinstance(s, int | float) and 0 <= s <= 1 for s in shares.values())
    )


def left(program: Program) -> dict[str, Any]:
    """By entry: ``entries``, how many opaque ops one call runs; ``left``, their names with counts; ``flops``, the share of
    the FLOPs that is raised (1.0 is all), for one row of `PHASES` tokens that attend to 512 entries."""
    names = {entry: opaque(program, entry) for entry in program.entries}
    return {
        "entries": {entry: sum(found.values()) for entry, found in names.items()},
        "left": names,
        "flops": {entry: raised_share(program, entry) if names[entry] else 1.0 for entry in program.entries},
    }


def opaque(program: Program, entry: str) -> dict[str, int]:
    """The operators of an entry that torch runs, by name, with how often they run."""
    found = (s.value for s in sites(program, program.entries[entry]) if s.value.op == "aten")
    return dict(sorted(Counter(v.attr("function").partition(".")[0] for v in found).items()))


def raised_share(program: Program, entry: str) -> float:
    """The part of an entry's FLOPs that is not in opaque operators (whose FLOPs are an estimate)."""
    longest = program.meta.get("positions", 512)
    tokens = min(PHASES.get(entry, 512), longest)
    rows = cost(program, entry, Sizes(tokens=tokens, rows=1, context=min(512, longest)))
    everything = total(rows).flops
    return 1.0 - total(r for r in rows if r.op == "aten").flops / everything if everything else 1.0
