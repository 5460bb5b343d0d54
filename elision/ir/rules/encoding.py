"""Rule encoding: rows are written, moved and dropped in whole groups of their encoding; reader and writer agree on the layout.

Example: ``select`` on a cache whose keys are ``Int(4, axis='token', group=32)``: 32 rows share one scale, so dropping one of them
would need all to be encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from elision.errors import IllegalProgram
from elision.ir.ops.program import origin
from elision.ir.printer import atom
from elision.ir.program import state_inputs
from elision.ir.rules.view import View
from elision.ir.states import KV
from elision.ir.walk import CONTROL, Site


def encoding(view: View) -> Iterator[IllegalProgram]:
    """No `select` from token-grouped segments; `flush` moves whole groups of both its segments; what the runtime runs takes and
    gives states of the declared types, and templates take caches of their heads and widths."""
    for site in view.once("select", "flush"):
        name, type = site.state(site.value.args[0])
        assert isinstance(type, KV)
        yield from (_select if site.value.op == "select" else _flush)(site, name, type)
    yield from _declared(view)
    yield from _bound(view)


def _select(site: Site, name: str, type: KV) -> Iterator[IllegalProgram]:
    grouped = [f"{e}" for s in type.main for e in (s.k, s.v) if e.token_group > 1]
    if grouped:
        yield IllegalProgram(
            "encoding",
            f"single entries are evicted from {name}, whose rows share scales",
            sides=f"{site.where}: select, on {grouped[0]}",
            because="rows of one token group are written and dropped only together",
            help="requantise to groups of channels (axis=channel), or leave out one of the two passes",
        )


def _flush(site: Site, name: str, type: KV) -> Iterator[IllegalProgram]:
    n = site.value.attr("n")
    for index in (site.value.attr("frm"), site.value.attr("to")):
        segment = type.segments[index]
        for plane in site.value.attr("what", "kv"):
            group = (segment.k if plane == "k" else segment.v).token_group
            if n % group:
                yield IllegalProgram(
                    "encoding",
                    f"flush moves {n} rows of {name}, but segment {index} has token groups of {group} ({plane})",
                    sides=f"{site.where}: flush",
                    because="a group that is cut has no scale of its own",
                    help=f"flush a multiple of {group} rows",
                )


def _declared(view: View) -> Iterator[IllegalProgram]:
    for run, graph in view.runs.items():
        for name, value in state_inputs(graph).items():
            declared = view.program.states.get(name)
            after = next((v.type for v in graph.outputs if v.is_state and origin(v) is value), value.type)
            if declared == value.type != after:
                yield IllegalProgram(
                    "encoding",
                    f"{run} gives back {name} as another type than the program declares",
                    sides=f"{run}: output of {name}, and state {name}",
                    because="whatever runs next reads it as {}, and it would be {}".format(*_apart(declared, after)),
                    help="declare the encoding that the state always has; recode only caches that live for one call",
                )
            if declared != value.type:
                yield IllegalProgram(
                    "encoding",
                    f"{run} takes {name} as another type than the program declares",
                    sides=f"{run}: input {name}, and state {name}",
                    because="the program has {}, the graph {}".format(*_apart(declared, value.type)),
                    help="change a state's type in program.states and in every entry, round and tick that takes it",
                )


def _bound(view: View) -> Iterator[IllegalProgram]:
    for site in view.once(*CONTROL):
        target = view.program.targets[site.value.attr("target")]
        for formal, given in zip(target.inputs[::-1], site.value.args[::-1], strict=False):
            if isinstance(formal.type, KV):
                name, type = site.state(given)
                want, have = _shape(formal.type), _shape(type) if isinstance(type, KV) else None
                if want != have:
                    yield IllegalProgram(
                        "encoding",
                        f"{target.name} is written for a cache of heads, dim, vdim = {want}, and {name} has {have}",
                        sides=f"{site.where}: {site.value.op} of {target.name}",
                        because="reader and writer would find rows at different places",
                        help="use a template of its own for this cache",
                    )


def _shape(type: KV) -> tuple[int, int, int]:
    return type.heads, type.dim, type.vdim


def _apart(one: object, other: object) -> tuple[str, str]:
    """Two types as text; of two caches what differs."""
    if not (isinstance(one, KV) and isinstance(other, KV)):
        return atom(one) if one else "no such state", atom(other)
    names = [f.name for f in fields(KV) if getattr(one, f.name) != getattr(other, f.name)]
    first, second = (", ".join(f"{n}={atom(getattr(type, n))}" for n in names) for type in (one, other))
    return first, second
