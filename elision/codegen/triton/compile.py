"""A program's entries as launches on a GPU, from the same regions and the same planner as on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from elision.codegen import views
from elision.codegen.planner import Planner
from elision.codegen.refusal import NotNative, knows, need
from elision.codegen.regions import Products, Region, regions
from elision.codegen.triton import (
    attention_rules,
    dense_rules,
    draft_rules,
    evict_rules,
    merge_rules,
    moe_rules,
    own_rules,
    page_rules,
    project_rules,
    rank_rules,
    round_rules,
    score_rules,
    token_rules,
)
from elision.codegen.triton.launches import Kernels, Launches
from elision.ir import schedule as abi
from elision.ir.flatten import flat_entries
from elision.ir.launch import DeviceCode
from elision.ir.ops.program import origin
from elision.ir.program import Program, Tick, committed_states, running, steps
from elision.ir.states import KV
from elision.ir.value import Graph, Value

_MANY = ("score", "prefill", "feed")  # entries of many tokens


def plan_program(program: Program, kernels: Kernels | None = None) -> DeviceCode:
    """The launches of every entry for every class of shapes, without machine code (`elision.codegen.triton.ahead`). What a round
    without drafts does not run (`step` and its commit) may have ops without a kernel: it is left out then. ``kernels``: none yet,
    but tiles that were measured."""
    kernels = Kernels() if kernels is None else kernels
    schedules: dict[str, dict[str, abi.Schedule]] = {}
    hosts: dict[str, list[tuple[str, str]]] = {}
    for entry, graph in flat_entries(program).items():
        schedules[entry] = {}
        for shape in ("many",) if entry in _MANY else ("one", "few", "some"):
            schedules[entry][shape], hosts[entry] = _entry(kernels, graph, shape)
    if hosts.get("score"):
        schedules.pop("score")
    names = [n for n in committed_states(program) if isinstance(program.states[n], KV)] if program.round is not None else []
    if names:
        try:
            schedules["commit"] = {"many": _commit(kernels, {n: program.states[n] for n in names})}  # type: ignore[misc]
        except NotNative as err:
            hosts["commit"] = [("commit", str(err))]
    for tick in program.ticks:
        name = tick.graph.name
        try:
            schedules[name], hosts[name] = {"many": _tick(kernels, tick)}, []
        except NotNative as err:
            hosts[name] = [("select", str(err))]
    if program.round is not None and any(v.op == "root" for v in program.round.values) and running(program.round).op == "call":
        for entry in (*steps(program), "commit"):
            if hosts.get(entry):
                schedules.pop(entry, None), hosts.pop(entry)
    if {"step", "commit"} <= schedules.keys():
        schedules |= {name: {"many": found} for name, found in draft_rules.drafts(kernels, program).items()}
    used = {r.kernel for each in schedules.values() for s in each.values() for r in s.rows}
    return DeviceCode({n: k for n, k in kernels.kernels.items() if n in used}, schedules, hosts)


def _entry(kernels: Kernels, graph: Graph, shape: str) -> tuple[abi.Schedule, list[tuple[str, str]]]:
    plan = Planner(graph, True, lambda name: [])
    to = Launches(kernels, plan, shape)
    found = plan.plan(regions(graph), _emitter(to, graph), lambda _: _end(to))
    return found, plan.hosts


def _end(to: Launches) -> None:
    attention_rules.advance_all(to)
    dense_rules.results(to)
    graph, plan = to.plan.graph, to.plan
    best = next((v for v in graph.outputs if v.op == "item" and v.args[0].op == "topk" and v in plan.refs), None)
    state = next((v.type for v in graph.inputs if isinstance(v.type, KV)), None)
    if best is None or state is None or not graph.inputs[0].tensor.tokens == best.tensor.tokens or plan.hosts:
        return
    given, tokens = to.whole(graph.inputs[0]), plan.axis(best)
    found = round_rules.sample(to, best.args[0].args[0], best, tokens)
    if plan.drafted(tokens):
        round_rules.walk(to, given, found, tokens, attention_rules.nodes(state))
    else:
        round_rules.follow(to, given, found, tokens)


def _commit(kernels: Kernels, states: dict[str, KV]) -> abi.Schedule:
    plan = Planner(Graph("commit", (), (), (), {}), True, lambda name: [])
    round_rules.commit(Launches(kernels, plan, "many"), states)
    found = plan.plan([], lambda *_: None)
    found.states = list(states)
    return found


def _tick(kernels: Kernels, tick: Tick) -> abi.Schedule:
    plan = Planner(Graph(tick.graph.name, (), (), (), {}), True, lambda name: [])
    evict_rules.evictions(Launches(kernels, plan, "many"), tick)
    return plan.plan([], lambda *_: None)


def _emitter(to: Launches, graph: Graph) -> Callable[[Planner, Region], None]:
    """What adds the launches of a region. Of few tokens projections are one launch, at their append."""
    fused = project_rules.projections(graph) if to.shape in ("one", "few") else {}
    inside = project_rules.inside(fused)

    def emit(_: Planner, region: Region) -> None:
        value = region.result if isinstance(region, Products) else region
        if value in fused:
            project_rules.project(to, value, fused[value])
        elif value not in inside:
            _emit(to, region)

    return emit


def _emit(to: Launches, region: Region) -> None:
    if isinstance(region, Products):
        dense_rules.products(to, region)
        return
    need(region.op in _RULES, f"{region.op} has no kernel")
    rule, *attributes = _RULES[region.op]
    knows(region, frozenset(attributes))
    rule(to, region)


def _map(to: Launches, value: Value) -> None:
    dense_rules.pointwise(to, value, value.attr("expr"))


def _kept(kept: Any, own: Any) -> Any:
    """One rule for caches that stay, one for those that live for the call."""

    def rule(to: Launches, value: Value) -> None:
        begins = origin(next(a for a in value.args if a.is_state))
        (kept if begins.op == "input" else own)(to, value)

    return rule


#: The rule of an op, and the attributes that it knows.
_RULES: dict[str, tuple[Any, ...]] = {
    "embed": (dense_rules.embed,),
    "restrict": (dense_rules.restrict,),
    "expand": (partial(dense_rules.pointwise, expr="x0"), "shape"),
    "norm": (dense_rules.norm, "kind", "eps", "offset", "cast"),
    "rope": (dense_rules.rope, "style", "scale"),
    "map": (_map, "expr", "dtype"),
    "view": (lambda to, value: views.view(to.plan, value), "shape"),
    "positions": (dense_rules.positions,),
    "first": (token_rules.chosen, "axis"),
    "last": (token_rules.chosen, "axis"),
    "patches": (token_rules.patches, "height", "width", "axis"),
    "extended": (token_rules.extended, "k", "axis"),
    "prepend": (token_rules.prepend,),
    "match": (merge_rules.match, "n", "share", "protect", "heads"),
    "fuse": (merge_rules.fuse, "keep", "protect"),
    "foremost": (merge_rules.foremost, "keep", "first", "last"),
    "received": (merge_rules.received, "mask", "scale", "softcap", "extras", "last"),
    "regard": (merge_rules.regard, "scale"),
    "pagerank": (rank_rules.pagerank, "scale", "rounds"),
    "prune": (rank_rules.prune, "keep", "similar", "protect"),
    "clusters": (merge_rules.compact, "axis"),
    "which": (merge_rules.compact, "axis"),
    "merge": (merge_rules.merge,),
    "collect": (merge_rules.merge,),
    "joined": (merge_rules.joined,),
    "gather": (merge_rules.gather,),
    "ones": (dense_rules.ones, "dtype"),
    "concat": (dense_rules.concat,),
    "slice": (lambda to, value: views.slice_(to.plan, value), "start", "stop", "axis"),
    "topk": (dense_rules.best, "k"),
    "fresh": (own_rules.fresh, "type"),
    "empty": (own_rules.empty, "type"),
    "append": (_kept(attention_rules.append, own_rules.append),),
    "attend": (_kept(attention_rules.attend, own_rules.attend), "mask", "scale", "softcap", "extras", "results", "page", "open"),
    "pick": (page_rules.pick, "n", "page", "open", "room", "first"),
    "observe": (score_rules.observe, "mask", "scale", "softcap", "extras", "last", "decoding"),
    "route": (
        moe_rules.route, "k", "kind", "renormalise", "eps", "scale", "groups", "top_groups", "group_best",
    ),
    "experts": (moe_rules.experts, "expr", "halves", "weighted"),
}  # fmt: skip
