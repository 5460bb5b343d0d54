"""Rule validity: every cache entry that attention can see was written, or is declared absent.

Example: an `append` under `when` (early exit). Tokens that leave early never write the cache of the later layers, and a later
token that does go there would read holes.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.mask import Mask
from elision.ir.program import guesses, running, state_inputs, steps
from elision.ir.rules.view import View
from elision.ir.states import KV


def validity(view: View) -> Iterator[IllegalProgram]:
    """An `append` of some tokens only, or under `when`, needs a cache whose ``present`` says so; a cache that `step` attends to
    is appended to in `prefill` and in `step` (one with a full mask, cross attention, in any entry)."""
    for site in view.once("append"):
        name, type = site.state(site.value.args[0])
        at = site.axis(site.value.args[1])
        partial = at is not None and at.parent is not None
        whole = name in view.program.states and isinstance(type, KV) and type.present.kind == "all"
        if whole and (partial or site.frame.guarded):
            yield IllegalProgram(
                "validity",
                f"{name} claims every position, but some tokens do not write it",
                sides=f"{site.where}: append {f'on {at}' if partial else 'under when'}",
                because="a later token would read entries that were never written",
                help="declare present=subset, nested or masked, or append before the tokens are chosen (fill)",
            )
    yield from _unwritten(view)
    yield from _early(view)
    yield from _stages(view)
    yield from _exits(view)


def _unwritten(view: View) -> Iterator[IllegalProgram]:
    entries = view.program.entries
    if "step" not in entries or "prefill" not in entries:
        return
    written = {n: {s.state(s.value.args[0])[0] for s in view.sites[n] if s.value.op == "append"} for n in entries}
    done: set[str] = set()
    for site in view.sites["step"]:
        if site.value.op != "attend":
            continue
        name, type = site.state(site.value.args[1])
        mask = site.attr("mask")
        crossed = isinstance(mask, Mask) and mask.kind == "full" and any(name in w for w in written.values())
        if name in done or name not in view.program.states or crossed or not isinstance(type, KV) or type.present.kind != "all":
            continue
        done.add(name)
        missing = [n for n in ("prefill", "step") if name not in written[n]]
        if missing:
            yield IllegalProgram(
                "validity",
                f"{name} is attended to in step, but not appended to in {' and '.join(missing)}",
                sides=f"{site.where}: attend",
                because="the tokens of that entry would be missing among its positions",
                help="append in both entries, leave out both, or declare present=subset",
            )


def _stages(view: View) -> Iterator[IllegalProgram]:
    """Where a round runs one of several steps, a later one appends to no cache that an earlier one leaves alone, and a cache that
    some leave alone says so; a model that drafts on these caches appends to none of them."""
    round = view.program.round
    if round is None or running(round).op not in ("staged", "routed"):
        return
    names = steps(view.program)
    written = {n: {s.state(s.value.args[0])[0] for s in view.sites[n] if s.value.op == "append"} for n in view.program.entries}
    drafted = {n for e in guesses(view.program) for n in written[e]}
    for name, type in view.program.states.items():
        runs = [name in written[n] for n in names]
        if not isinstance(type, KV) or all(runs) or not any(runs):
            continue
        last = names[runs.index(False) - 1]
        why = ""
        if type.present.kind != "nested":
            why, help = "the entries of tokens that passed by would be missing among its positions", "declare present=nested"
        elif sorted(runs, reverse=True) != runs:
            why, help = "a later token would read entries that were never written", "leave out more from step to step, never less"
        elif name in drafted:
            why, help = "what a draft writes to it would not be what the step that verifies it leaves", "draft from tables"
        if why:
            yield IllegalProgram(
                "validity",
                f"{name} is appended to in {last}, but not in all of {', '.join(names)}",
                sides=f"round: {running(round).op}",
                because=why,
                help=help,
            )


def _exits(view: View) -> Iterator[IllegalProgram]:
    """Where nodes leave a step between its parts, the caches of the parts after it are filled there, or declare holes, or are
    caught up with by a late form of the part before anybody looks; no draft writes into what declares either, or is held."""
    round = view.program.round
    if round is None or running(round).op != "exits":
        return
    names, parts = steps(view.program), running(round).attr("parts")
    written = {n: {s.state(s.value.args[0])[0] for s in view.sites[n] if s.value.op == "append"} for n in view.program.entries}
    drafted = {n for e in guesses(view.program) for n in written[e]}
    late = running(round).attr("held", 0) > 0
    held = list(state_inputs(view.program.entries["step"]))[1 - parts :] if late else []
    for name in [name for name in held if name in drafted]:
        yield IllegalProgram(
            "validity",
            f"a draft writes into {name}, which holds the tokens that left at an exit",
            sides="round: exits",
            because="what it wrote would be run late as if it had left there",
            help="draft from tables, or with another model",
        )
    for i in range(1, parts):
        later = set[str]().union(*(written[n] for n in names[i : i + 1 if late else parts]))
        filled = written[names[parts + i - 1]] if len(names) > parts + 1 else set()
        for name in sorted(later if late else later - filled):
            type = view.program.states[name]
            holes = isinstance(type, KV) and type.present.kind == ("deferred" if late and name in filled else "masked")
            if not holes or name in drafted:
                yield IllegalProgram(
                    "validity",
                    f"{name} is not filled for tokens that leave before {names[i]}",
                    sides="round: exits",
                    because="a draft writes what is to be absent" if holes else "a later token would read entries never written",
                    help="draft from tables" if holes else "fill it from the stream where they left, or declare present=masked",
                )


def _early(view: View) -> Iterator[IllegalProgram]:
    """A token sees itself: its call appends its keys before it attends to them (unless the mask is full: cross attention)."""
    for entry in ("prefill", "step"):
        appended: set[str] = set()
        for site in view.sites.get(entry, ()):
            if site.value.op == "append":
                appended.add(site.state(site.value.args[0])[0])
            if site.value.op != "attend":
                continue
            name, type = site.state(site.value.args[1])
            mask = site.attr("mask")
            crossed = isinstance(mask, Mask) and mask.kind == "full"
            if name in appended or crossed or name not in view.program.states:
                continue
            if isinstance(type, KV) and type.present.kind == "all":
                yield IllegalProgram(
                    "validity",
                    f"{name} is attended to before the tokens of the call are appended",
                    sides=f"{site.where}: attend",
                    because="the entries of the call's own tokens are not there yet",
                    help="append first and attend to what it gives",
                )
