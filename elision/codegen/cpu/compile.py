"""A program's entries as native code: one object file, a schedule per entry."""

from __future__ import annotations

from functools import partial

from elision.codegen.cpu import cache, evict, flush
from elision.codegen.cpu.attention_rules import forms, lists_of, older
from elision.codegen.cpu.credit import credited
from elision.codegen.cpu.emitters import Emitter
from elision.codegen.cpu.gumbel import Noise
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.lower import to_object
from elision.codegen.planner import Planner
from elision.codegen.refusal import NotNative
from elision.codegen.regions import OF_INPUTS, OF_TOKENS, regions
from elision.errors import IllegalProgram
from elision.ir import schedule as abi
from elision.ir.flatten import flat_entries
from elision.ir.program import Program, committed_states
from elision.ir.states import KV
from elision.llvm.processor import host_level, machine


def compile_program(program: Program) -> abi.NativeCode:
    """Compile the entries (of generation, of a model that drafts, the model's own forward ``score``) and the commit of a round.

    Raises BadInput without the MLIR bindings, IllegalProgram for caches whose keys and values are flushed apart.
    """
    _together(program)
    kernels, level = Kernels(), host_level()
    emitter = Emitter(kernels, level)
    schedules: dict[str, abi.Schedule] = {}
    hosts: dict[str, list[tuple[str, str]]] = {}
    packings: dict[str, str] = {}
    for entry, graph in flat_entries(program).items():
        plan = Planner(graph, entry.partition("_")[0] in _MANY, kernels.signatures.__getitem__)
        plan.schedule.packings = packings
        schedules[entry] = plan.plan(regions(graph), emitter, lambda p: _advance_all(p, kernels))
        hosts[entry] = [h for h in plan.hosts if h[0] not in _ON_HOST]
    if program.states and all(_plain(s) for s in program.states.values()):
        schedules["commit"] = _commit(program, kernels)
    for each in program.ticks:
        if (made := evict.tick(kernels, each) or flush.tick(kernels, each)) is not None:
            schedules[each.graph.name] = made
    code = to_object(kernels.text(), level)
    return abi.NativeCode(code, schedules, hosts, kernels.signatures, machine(), level, kernels.text())


_MANY = ("score", "prefill", "feed", "late")  # entries of many tokens: these and ``late_..``
_ON_HOST = (*OF_TOKENS, *OF_INPUTS)  # ready before native code starts


def _together(program: Program) -> None:
    for tick in program.ticks:
        for value in tick.graph.values:
            if value.op == "flush" and value.attr("what", "kv") != "kv":
                raise IllegalProgram(
                    "demand", "keys and values are flushed apart", sides=f"{tick.graph.name}: flush of {value.attr('what')!r}",
                    because="kernels count the entries of a segment once for both", help="compile with target='reference'",
                )  # fmt: skip


def _plain(state: object) -> bool:
    """Whether kernels append to and commit this state."""
    if not isinstance(state, KV) or state.scratch is None:
        return False
    try:
        forms(state)
    except NotNative:
        return False
    return True


def _advance_all(plan: Planner, kernels: Kernels) -> None:
    """Committed tokens are counted once everything has been read."""
    done = [r for r in plan.kernels() if r[0].startswith("append_")]
    types = {plan.state(v): v.type for v in plan.graph.inputs if isinstance(v.type, KV)}
    for _, operands in done:
        name = next(o for o in operands if o[0] == "state")[1]
        axis = operands[0]
        if not plan.drafted(axis[1]) and name not in plan.schedule.caches:
            kernel = _advance(kernels, types[name], False)
            plan.row(kernel, axis, ("state", name), ("int", abi.LAST), reads=[name], writes=[name])


def _advance(kernels: Kernels, state: object, some: bool) -> str:
    assert isinstance(state, KV)
    lists = lists_of(state)
    return kernels.add(("advance", lists, some), partial(cache.advance, lists=lists, some=some))


def _commit(program: Program, kernels: Kernels) -> abi.Schedule:
    """Every cache takes its accepted nodes, then counts them. Axis 0 is that of the accepted tokens."""
    rows: list[abi.Row] = []
    names = committed_states(program)
    for name in names:
        state = program.states[name]
        assert isinstance(state, KV)
        kinds, lists, some, before = forms(state), lists_of(state), state.present.partial, older(state) is not None
        key = ("commit", state.heads, state.dim, state.vdim, kinds, lists, before, some)
        make = partial(
            cache.commit, heads=state.heads, dim=state.dim, vdim=state.vdim, forms=kinds, lists=lists, older=before, some=some
        )
        kernel = kernels.add(key, make)
        rows.append(abi.Row(kernel, (("axis", 0), ("state", name))))
    for name in names:
        state = program.states[name]
        if isinstance(state, KV) and state.scores is not None and state.scores.depth:
            noise = Noise.operands(state.scores.gumbel)
            for array, decay in state.scores.arrays.items():
                kernel = credited(kernels, state, array)
                rows.append(abi.Row(kernel, (("axis", 0), ("state", name), ("float", decay), *noise)))
    rows[-1] = abi.Row(rows[-1].kernel, rows[-1].operands, True)
    for name in names:
        state = program.states[name]
        kernel = _advance(kernels, state, isinstance(state, KV) and state.present.partial)
        rows.append(abi.Row(kernel, (("axis", 0), ("state", name), ("int", abi.LAST))))
    return abi.Schedule("commit", ["accepted"], rows=rows, states=names)
