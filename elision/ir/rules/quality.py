"""Rule quality: a program does not claim more than its content allows (exact < distribution < approximate).

Example: a program with an Int8 cache that says quality='exact'.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.mask import Mask
from elision.ir.program import QUALITIES, guesses, state_inputs
from elision.ir.rules.view import View
from elision.ir.states import KV, Float, Ring


def quality(view: View) -> Iterator[IllegalProgram]:
    """What evicts, rounds to integers, leaves tokens out of attention or merges them is approximate. A cache in a float dtype
    narrower than the model's is the user's choice of dtype and not counted."""
    claimed = view.program.quality
    if claimed not in QUALITIES:
        yield _illegal(claimed, "program", f"it is none of {', '.join(QUALITIES)}")
    elif claimed != "approximate":
        for where, because in _lossy(view):
            yield _illegal(claimed, where, because)


def _illegal(claimed: str, where: str, because: str) -> IllegalProgram:
    return IllegalProgram(
        "quality",
        f"the program claims quality {claimed!r}",
        sides=where,
        because=because,
        help="declare quality='approximate' in the pass that does it",
    )


def _lossy(view: View) -> Iterator[tuple[str, str]]:
    drafts = {*guesses(view.program), "feed"} & set(view.program.entries)  # a drafter may do what it likes
    kept = {n for e, g in view.program.entries.items() if e not in drafts for n in state_inputs(g)}
    for name, type in view.program.states.items():
        if isinstance(type, KV) and (name in kept or not drafts):
            for i, segment in enumerate(type.main):
                for e in (segment.k, segment.v):
                    if not isinstance(e, Float):
                        yield f"state {name}: segment {i}", f"its rows are rounded to {e.bits} bits"
    for site in view.once("linear", "select", "recode", "merge", "append", "attend", "restrict", "when"):
        value = site.value
        if site.root.name in drafts:
            continue
        if value.op == "linear" and site.attr("a8"):
            yield f"{site.where}: linear", "activations are rounded to integers"
        elif value.op == "select":
            yield f"{site.where}: select", "entries are evicted that attention would see"
        elif value.op == "recode" and not all(isinstance(value.attr(x), Float) for x in "kv"):
            yield f"{site.where}: recode", "rows are rounded to integers"
        elif value.op == "merge":
            yield f"{site.where}: merge", "tokens are averaged"
        elif value.op in ("restrict", "when") and site.root is not view.program.round:  # a drafter may skip what it likes
            if value.op == "when" or view.chosen(site, site.axis(value)):
                yield f"{site.where}: {value.op}", "tokens pass by what the model computes for them"
        elif value.op in ("append", "attend"):
            at = site.axis(value.args[1 if value.op == "append" else 0])
            if view.chosen(site, at):
                yield f"{site.where}: {value.op} on {at}", "tokens are left out of attention"
        if value.op == "attend" and (why := _shortened(site.state(value.args[1])[1], site.attr("mask"))):
            yield f"{site.where}: attend", why


def _shortened(type: object, mask: object) -> str | None:
    """Why a Ring hides entries that the mask would show, or None."""
    ring = type.main[-1].slots if isinstance(type, KV) else None
    if not isinstance(ring, Ring) or (isinstance(mask, Mask) and mask.kind in ("window", "chunk") and mask.size <= ring.window):
        return None
    return f"the cache holds the last {ring.window} positions, and the mask {mask} shows more"
