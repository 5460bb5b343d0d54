"""What makes a list of passes legal: what each pass says of the states so that the others may run, and what would mend a list
that is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from elision.errors import BadInput, IllegalProgram
from elision.ir.program import Program
from elision.ir.states import KV, StateType
from elision.passes import from_text
from elision.passes.pipeline import resolve, run, steps

#: What a pass may set `every` to, so that no round of drafts has to be taken back across it.
CLOCKS = (16, 64)


def explained(program: Program, passes: Sequence[str]) -> list[str]:
    """One line for each thing that is done so that the passes compose, with the rule that asks for it."""
    found: list[str] = []
    ran = resolve(passes)
    if ran != [from_text(text) for text in passes]:
        order = ", then ".join(step.text() for step in ran)
        found.append(f"order: {order}; the compiler sorts passes by what they change")
    before = program
    for step, after in steps(program, passes):
        found += [f"{step.name}: {line}" for line in _of(before, after)]
        before = after
    return found


def _of(before: Program, after: Program) -> Iterator[str]:
    kept = {n: (before.states[n], t) for n, t in after.states.items() if n in before.states}
    for what, says in _CHANGES.items():
        names = [n for n, (old, new) in kept.items() if _fact(old, what) != _fact(new, what)]
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            yield f"{says.format(_fact(kept[names[0]][1], what))}: {some}"
    if any(name.startswith("fill_") for name in {*after.entries} - {*before.entries}):
        yield "layers that a token leaves out get keys and values of its stream there (rule validity)"
    for every in sorted({t.every for t in after.ticks} - {t.every for t in before.ticks} - {0}):
        yield f"runs when a sequence has a multiple of {every} tokens, which no round of drafts crosses (rule retract)"


#: By fact of a cache, what its change means.
_CHANGES = {
    "keyed_by": "entries say their own positions, since some are dropped or absent (rule address)",
    "ragged": "lengths differ from one sequence to the next (rule ragged)",
    "present": "not every position is in every layer: {} (rule validity)",
    "rope": "keys are rotated when they are read, since positions are renumbered (rule rotation)",
}


def _fact(type: StateType, what: str) -> object:
    if not isinstance(type, KV):
        return None
    return type.present.kind if what == "present" else getattr(type, what)


def mended(program: Program, passes: Sequence[str]) -> str | None:
    """The passes as text with one `every` lengthened, if they are legal then; None if that mends nothing."""
    given = [from_text(text) for text in passes]
    for i, step in enumerate(given):
        for every in CLOCKS if any(f.name == "every" for f in dataclasses.fields(step)) else ():
            try:
                longer = dataclasses.replace(step, every=every)  # type: ignore[call-arg]
                run(program, [*given[:i], longer, *given[i + 1 :]])
            except (BadInput, IllegalProgram):
                continue
            return f"legal with {longer.text()} in the place of {step.text()}: it then keeps other entries"
    return None
