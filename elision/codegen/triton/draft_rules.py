"""The launches that draft on the device, for drafters whose trees have one template, and those that follow the verification.

They run on the tokens of a call of ``step``: its axis, input and output are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elision.codegen.planner import Planner
from elision.codegen.triton.configs import power
from elision.codegen.triton.launches import Arg, Kernels, Launches, axis, on_round, size
from elision.ir.drafting import lookup, recycling  # noqa: F401  (they register their drafters)
from elision.ir.drafting.drafter import Drafter, make
from elision.ir.drafting.lookup import PromptLookup
from elision.ir.drafting.recycling import TokenRecycling
from elision.ir.launch import DRAFTS
from elision.ir.program import Program, drafting
from elision.ir.schedule import Schedule
from elision.ir.tree import MAX_NODES
from elision.ir.value import Graph

IDS, BEST = Arg(("input", 0), "*i64"), Arg(("output", 1), "*i64")


def drafts(kernels: Kernels, program: Program) -> dict[str, Schedule]:
    """``propose``, which precedes ``step`` and ``commit``, and ``learn``, which follows; nothing where the host drafts: for
    several drafters, whose trees are merged, and for those without a rule here."""
    methods = drafting(program.round)[1] if program.round is not None else ()
    if len(methods) != 1 or methods[0].partition(":")[0] not in _RULES:
        return {}
    drafter = make(methods[0], program.meta["vocab"])
    assert drafter.template is not None
    nodes, levels = len(drafter.template), int(drafter.template.depth[-1])
    wide = program.entries["step"].outputs[1].tensor.width
    empty = [Planner(Graph(name, (), (), (), {}), True, lambda _: []) for name in ("propose", "learn")]
    propose, learn = (Launches(kernels, plan, "many") for plan in empty)
    args: dict[str, Arg | None] = {
        "ids": IDS, **{n: axis(0, n) for n in ("pos", "parent", "anc", "start")}, "rates": _of("rates", "fp64"),
        **{n: _of(n) for n in ("told", "history", "length", "room", "template")}, "capacity": size(DRAFTS, "capacity"),
    }  # fmt: skip
    _RULES[drafter.name](drafter, propose, learn, args, dict(NODES=nodes, DEPTH=levels, N=power(nodes)), wide)
    taken: dict[str, Arg | None] = {
        **{n: _of(n) for n in ("told", "history", "length")}, "ids": IDS, "start": axis(0, "start"),
        **{n: on_round(n) for n in ("path", "accepted", "next")}, "capacity": size(DRAFTS, "capacity"),
    }  # fmt: skip
    learn.launch("take", (("rows", 1),), taken, dict(NODES=nodes, PATH=MAX_NODES, N=power(nodes)), writes=[DRAFTS], warps=1)
    return {to.plan.graph.name: to.plan.plan([], lambda *_: None) for to in (propose, learn)}


def _of(array: str, type: str = "i64") -> Arg:
    """An array of a run's drafts or of its drafter's tables."""
    return Arg(("state", DRAFTS, array), f"*{type}")


def _lookup(drafter: Drafter, propose: Launches, _: Launches, args: dict[str, Any], sizes: dict[str, int], wide: int) -> None:
    assert isinstance(drafter, PromptLookup)
    propose.launch("draft_lookup", (("rows", 1),), args, dict(**sizes, MATCH=drafter.match, BLOCK=1024), writes=[DRAFTS], warps=8)


def _recycled(
    drafter: Drafter, propose: Launches, learn: Launches, args: dict[str, Any], sizes: dict[str, int], wide: int
) -> None:  # fmt: skip
    assert isinstance(drafter, TokenRecycling)
    tables = {"successors": _of("successors", "i32"), "steady": _of("steady", "i8")}
    propose.launch("draft_recycled", (("rows", 1),), {**args, **tables}, dict(**sizes, K=drafter.k), writes=[DRAFTS], warps=8)
    taken: dict[str, Arg | None] = {**tables, "ids": IDS, "best": BEST, "parent": axis(0, "parent")}
    fixed = dict(K=drafter.k, WIDE=wide, BLOCK=MAX_NODES)
    learn.launch("recycle", (("tokens", 0, 1),), taken, fixed, writes=[DRAFTS], warps=1)


_RULES: dict[str, Callable[..., None]] = {PromptLookup.name: _lookup, TokenRecycling.name: _recycled}
