"""Rule retract: whatever a round writes before `commit` can be taken back.

Example: ``select(kv_0, ..)`` between `checkpoint` and `commit` evicts by scores of drafted tokens. If these are rejected, the
evicted entries are gone all the same, and the output is not that of decoding without speculation.
"""

from __future__ import annotations

from collections.abc import Iterator

from elision.errors import IllegalProgram
from elision.ir.ops.program import consumes
from elision.ir.program import Program, Tick, state_inputs
from elision.ir.rules.view import View
from elision.ir.states import KV, Journal, Scratch, Snapshot
from elision.ir.value import Graph, Value
from elision.ir.walk import Site

_ON_THE_CLOCK = "run it on the clock: in a tick, every n committed tokens"


def retract(view: View) -> Iterator[IllegalProgram]:
    """In the round, between `checkpoint` and `commit`, a cache is only appended to, at drafted tokens and in its Scratch, and an
    array only written with an undo that reaches back to the checkpoint; nothing is evicted, flushed or recoded."""
    graph = view.program.round
    depth = _depth(graph) if graph is not None else 1
    for tick in view.program.ticks:
        yield from _tick(view, tick, depth)
    if graph is None:
        return
    changes: dict[tuple[Value, str], list[Site]] = {}
    for site in view.sites[graph.name]:
        if site.changes is not None:
            changes.setdefault((site.top, site.state(site.changes)[0]), []).append(site)
    following = {before: v for v in graph.values if v.is_state and (before := consumes(v)) is not None}
    for name, state in state_inputs(graph).items():
        depth_now: int | None = None  # None outside of checkpoint .. commit
        while (after := following.get(state)) is not None:
            state = after
            if state.op in ("checkpoint", "commit", "drop"):
                if (state.op != "checkpoint") == (depth_now is None):
                    yield _unpaired(graph, name, state.op)
                depth_now = state.attr("depth") if state.op == "checkpoint" else None
                continue
            for site in changes.get((state.args[0] if state.op == "item" else state, name), ()):
                yield from _change(site, name, depth_now)
        if depth_now is not None:
            yield _unpaired(graph, name, "checkpoint")


def _depth(graph: Graph) -> int:
    return max((v.attr("depth") for v in graph.values if v.op == "checkpoint"), default=1)


def _change(site: Site, name: str, depth: int | None) -> Iterator[IllegalProgram]:
    value = site.value
    assert site.changes is not None
    type = site.state(site.changes)[1]
    what = f"{name} cannot take back {depth or 'drafted'} token{'s' if depth != 1 else ''}"
    sides = f"{site.where}: {value.op}, inside the round"

    def illegal(because: str, help: str) -> IllegalProgram:
        return IllegalProgram("retract", what, sides=sides, because=because, help=help)

    if value.op not in ("append", "write", "observe"):
        yield illegal(f"{value.op} acts on tokens that are not verified yet, and has no undo", _ON_THE_CLOCK)
        return
    axis = site.axis(value.args[1 if value.op == "observe" else -1])
    drafted = axis is not None and axis.drafted
    if depth is None:
        if drafted:
            because = "the tokens are drafts, but the state is not between checkpoint and commit"
            yield illegal(because, "checkpoint it before and commit it after")
    elif _late(site):
        return
    elif not drafted:
        because = f"its tokens ({axis}) are not drafts, so it acts at once, as if they were committed"
        yield illegal(because, f"{value.op} at the draft's axis, or before checkpoint or after commit")
    elif value.op == "observe" and isinstance(type, KV) and type.scores is not None and type.scores.depth < depth:
        help = f"give it Scores(depth={depth}), or {_ON_THE_CLOCK}"
        yield illegal(f"what its scores keep of drafted tokens is {type.scores.depth} deep", help)
    elif isinstance(type, KV):
        scratch = type.scratch
        if scratch is None or not isinstance(scratch.slots, Scratch) or scratch.slots.n < depth:
            have = "no Scratch" if scratch is None else f"{scratch.slots}"
            yield illegal(f"the cache has {have} for the drafted rows", f"add Segment(Scratch({depth})) as its last segment")
    elif type.undo is None:
        yield illegal(
            "the value is overwritten, and the state has undo=None",
            f"give it undo=Journal({depth}), or {_ON_THE_CLOCK}",
        )
    elif isinstance(type.undo, Journal) and type.undo.depth < depth:
        yield illegal(f"its journal keeps {type.undo.depth}", f"give it undo=Journal({depth})")
    elif isinstance(type.undo, Snapshot) and depth > 1:
        because = "a snapshot goes back to the checkpoint, and nothing runs the accepted tokens again"
        yield illegal(because, f"give it undo=Journal({depth})")


def _late(site: Site) -> bool:
    """Whether it is run by a round with exits on what earlier rounds committed, which nothing takes back."""
    run, frame = site.top, site.frame
    while frame.parent is not None and frame.parent.parent is not None:
        frame = frame.parent
    return run.op == "exits" and run.attr("held", 0) > 0 and frame.graph.name in run.attr("targets")[run.attr("parts") : -1]


def _unpaired(graph: Graph, name: str, op: str) -> IllegalProgram:
    other = "commit" if op == "checkpoint" else "checkpoint"
    return IllegalProgram(
        "retract",
        f"the {op} of {name} has no {other}",
        sides=f"{graph.name}: {op}",
        because="a round begins with checkpoint and ends with commit, once for every state",
        help=f"{'follow' if op == 'checkpoint' else 'precede'} it by {other}",
    )


def _tick(view: View, tick: Tick, depth: int) -> Iterator[IllegalProgram]:
    name = tick.graph.name
    if tick.every < 0 or (tick.every == 1 and depth > 1):
        yield IllegalProgram(
            "retract",
            f"{name} runs every {tick.every} tokens, and a round drafts up to {depth}",
            sides=f"{name}, and {_round_name(view.program)} with checkpoint depth {depth}",
            because="the clock would have to tick inside the round, before its tokens are verified",
            help=f"lengthen every, for example every={max(16, depth)} (changes what the tick sees: the semantics change)",
        )
    for site in view.sites[name]:
        if site.value.op == "append":
            yield IllegalProgram(
                "retract",
                f"{name} appends to {site.state(site.value.args[0])[0]}",
                sides=f"{site.where}: append, on the clock",
                because="only the tokens of prefill and of committed rounds are entries of a cache; a tick moves or evicts them",
                help="append in prefill and step",
            )


def _round_name(program: Program) -> str:
    return program.round.name if program.round is not None else "the round"
