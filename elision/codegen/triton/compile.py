"""A program's entries as launches on a GPU, from the same regions and the same planner as on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from elision.codegen import views
from elision.codegen.planner import Planner
from elision.codegen.refusal import NotNative, knows, need
from elision.codegen.regions import OF_INPUTS, OF_TOKENS, Products, Region, regions
from elision.codegen.triton import attention_rules, dense_rules, evict_rules, moe_rules, page_rules, round_rules, score_rules
from elision.codegen.triton.launches import Kernels, Launches
from elision.ir import schedule as abi
from elision.ir.flatten import generating_entries
from elision.ir.launch import DeviceCode
from elision.ir.program import Program, Tick, committed_states, running, steps
from elision.ir.states import KV
from elision.ir.value import Graph, Value

_MANY = ("score", "prefill", "feed")  # entries of many tokens


def plan_program(program: Program) -> DeviceCode:
    """The launches of every entry for every class of shapes, without machine code (`elision.codegen.triton.ahead`). What a round
    without drafts does not run (`step` and its commit) may have ops without a kernel: it is left out then."""
    kernels = Kernels()
    schedules: dict[str, dict[str, abi.Schedule]] = {}
    hosts: dict[str, list[tuple[str, str]]] = {}
    for entry, graph in generating_entries(program).items():
        schedules[entry] = {}
        for shape in ("many",) if entry in _MANY else ("one", "few", "some"):
            schedules[entry][shape], hosts[entry] = _entry(kernels, graph, shape)
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
    used = {r.kernel for each in schedules.values() for s in each.values() for r in s.rows}
    return DeviceCode({n: k for n, k in kernels.kernels.items() if n in used}, schedules, hosts)


def _entry(kernels: Kernels, graph: Graph, shape: str) -> tuple[abi.Schedule, list[tuple[str, str]]]:
    plan = Planner(graph, True, lambda name: [])
    to = Launches(kernels, plan, shape)
    found = plan.plan(regions(graph), lambda _, region: _emit(to, region), lambda _: _end(to))
    return found, _left(plan)


def _left(plan: Planner) -> list[tuple[str, str]]:
    """What has no kernel, and is not known before the first launch."""
    return [h for h in plan.hosts if h[0] not in (*OF_TOKENS, *OF_INPUTS)]


def _end(to: Launches) -> None:
    attention_rules.advance_all(to)
    graph, plan = to.plan.graph, to.plan
    best = next((v for v in graph.outputs if v.op == "item" and v.args[0].op == "topk" and v in plan.refs), None)
    state = next((v.type for v in graph.inputs if isinstance(v.type, KV)), None)
    if best is None or state is None or not graph.inputs[0].tensor.tokens == best.tensor.tokens or _left(plan):
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
    "slice": (lambda to, value: views.slice_(to.plan, value), "start", "stop", "axis"),
    "topk": (dense_rules.best, "k"),
    "append": (attention_rules.append,),
    "attend": (attention_rules.attend, "mask", "scale", "softcap", "extras", "results", "page", "open"),
    "pick": (page_rules.pick, "n", "page", "open", "room", "first"),
    "observe": (score_rules.observe, "mask", "scale", "softcap", "extras", "last", "decoding"),
    "route": (
        moe_rules.route, "k", "kind", "renormalise", "eps", "scale", "groups", "top_groups", "group_best",
    ),
    "experts": (moe_rules.experts, "expr", "halves", "weighted"),
}  # fmt: skip
