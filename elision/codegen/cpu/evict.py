"""Eviction on the clock: which entries of a list stay (`keep`), and the moves that close the gaps (`select`), in one kernel.

The n-th largest key of a list is found bit by bit, by counting; ties are settled by the position in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elision.codegen.cpu.attention_rules import lists_of, plain_forms
from elision.codegen.cpu.cache_rows import scaled, unit
from elision.codegen.cpu.emit import Fn, Val, lanes, like
from elision.codegen.cpu.flash import VI, both
from elision.codegen.cpu.kernel import Kernel, State
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.observe import padded
from elision.codegen.refusal import NotNative
from elision.ir import schedule as abi
from elision.ir.layout import LANES
from elision.ir.program import Tick
from elision.ir.states import KV, Budget
from elision.ir.value import Graph, Value

_BITS, _INF, _FAR = 31, 0x7F800000, 0x7FFFFFFF


@dataclass(frozen=True)
class Lists:
    """What is fixed in the code: the rows of a cache, how many lists of entries a sequence has, what they are ranked by."""

    heads: int
    dim: int
    vdim: int
    forms: tuple[str, str]
    lists: int
    scored: bool  # by scores, or by position
    moves_scores: bool


def tick(kernels: Kernels, of: Tick) -> abi.Schedule | None:
    """The schedule of a tick, axis 0 being the sequences that are due; None if it does anything but keep the best of every cache
    that kernels read."""
    found = _evictions(of.graph)
    if found is None:
        return None
    rows: list[abi.Row] = []
    largest = max(keep.attr("n") for _, keep in found)
    for turn, (state, keep) in enumerate(found):
        type = state.type
        assert isinstance(type, KV)
        try:
            site = Lists(
                type.heads, type.dim, type.vdim, plain_forms(type), lists_of(type), keep.args[0].op == "scored",
                type.scores is not None,
            )
        except NotNative:
            return None
        kernel = kernels.add(("evict", site), lambda name, site=site: evict(name, site))  # type: ignore[misc]
        sizes = [("int", keep.attr(name, 0)) for name in ("n", "recent", "sinks")]
        free = ("tensor", 1, 0, 4)
        rows.append(abi.Row(kernel, (("axis", 0), ("state", of.graph.names[state]), *sizes, ("int", turn), free)))
    buffers = [abi.Buffer(0, 0, False, -1), abi.Buffer(-1, -(-largest * 4 // 64) * 64, True, 0)]
    return abi.Schedule(of.graph.name, ["rows"], buffers, rows, [0], [], [of.graph.names[state] for state, _ in found])


def _evictions(graph: Graph) -> list[tuple[Value, Value]] | None:
    """The caches of a tick with what they `keep`, if it is nothing but that, by score or by position."""
    found = []
    for value in graph.outputs:
        if value.op != "select" or value.attr("renumber") or value.args[0].op != "input" or value.args[1].op != "keep":
            return None
        (state, keep, rows), (score, pos) = value.args, value.args[1].args
        known = score is pos or (score.op, *score.args) == ("scored", state, rows)
        if not known or (pos.op, *pos.args) != ("entries", state, rows) or rows.op != "input":
            return None
        type = state.type
        if not isinstance(type, KV) or len(type.main) != 1 or not isinstance(type.main[0].slots, Budget):
            return None
        if type.scores is not None and len(type.scores.arrays) > 1:
            return None
        found.append((state, keep))
    return found or None


def evict(name: str, site: Lists) -> Kernel:
    """Lists of more than ``n`` entries keep ``n``. Threads share the lists; ``free`` holds the slots that one has to fill."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, state = kernel.axis(), kernel.state("S")
    n, recent, sinks, turn = (kernel.integer(x) for x in ("n", "recent", "sinks", "turn"))
    free = kernel.tensor("free").base
    with fn.loop(0, axis.count) as sequences, fn.loop(0, site.lists) as each:
        row = fn.load(axis.array("row"), "i64", sequences.index)
        line = row * site.lists + each.index
        length = fn.load(state.address("len_k"), "i64", line)
        mine = fn.compare((line + turn) % kernel.threads, "eq", kernel.tid)
        with fn.when(both(fn, mine, fn.compare(length, "sgt", n))):
            _one(fn, site, state, row, each.index, line, length, n, recent, sinks, free)
    return kernel


def _one(
    fn: Fn, site: Lists, state: State, row: Val, which: Val, line: Val, length: Val, n: Val, recent: Val, sinks: Val, free: Val
) -> None:
    """One list that is too long."""
    one, zero = fn.const(1, "i32"), fn.const(0, "i32")
    first, count = (row * site.heads + which, 1) if site.lists > 1 else (row * site.heads, site.heads)
    positions = fn.at(state.address("pos"), line * state.number("entries"), "i32")
    wide = padded(state.number("entries")) if site.moves_scores else zero
    scores = [fn.at(state.address("score"), (first + i) * wide, "f32") for i in range(count if site.moves_scores else 0)]
    blocks = (length + (LANES - 1)) // LANES
    iota, total = fn.const(list(range(LANES)), VI), fn.i32(n)

    def as_wide(x: Val, like: Val) -> Val:
        return fn.splat(x, LANES) if lanes(like.type) > 1 else x

    def position(place: Val, type: str) -> tuple[Val, Val]:
        """The position at a place (-1 beyond the end), and whether there is one."""
        pos = fn.load(positions, type, place, "i32")
        here = fn.i32(place) if type == "i32" else fn.splat(fn.i32(place), LANES) + iota
        there = fn.compare(here, "slt", as_wide(fn.i32(length), here))
        return fn.select(there, pos, fn.const(-1, type)), there

    with fn.loop(0, blocks, 1, [fn.const(-1, VI)]) as loop:
        loop.give(fn.maximum(loop.carried[0], position(loop.index * LANES, VI)[0]))
    newest = fn.top(loop.results[0])

    def key(place: Val, type: str = VI) -> tuple[Val, Val]:
        """What an entry is ranked by, as an integer (scores are not negative), and its position."""
        pos, there = position(place, type)
        found = pos
        if site.scored:
            kind = like(type, "f32")
            score = fn.load(scores[0], kind, place, "f32")
            for more in scores[1:]:
                score = score + fn.load(more, kind, place, "f32")
            found = fn.cast(score, "arith.bitcast", type)
        early = fn.compare(pos, "slt", as_wide(fn.i32(sinks), pos))
        late = fn.compare(pos, "sgt", as_wide(newest - fn.i32(recent), pos))
        protected = fn.emit(f"arith.ori {early.name}, {late.name} : {early.type}", early.type)
        found = fn.select(protected, fn.const(_INF, type), found)
        return fn.select(there, found, fn.const(-1, type)), pos

    def how_many(holds: Callable[[Val, Val], Val]) -> Val:
        with fn.loop(0, blocks, 1, [fn.const(0, VI)]) as loop:
            good = holds(*key(loop.index * LANES))
            loop.give(loop.carried[0] + fn.select(good, fn.const(1, VI), fn.const(0, VI)))
        return fn.sum(loop.results[0])

    with fn.loop(0, _BITS, 1, [zero]) as bits:
        least = bits.carried[0] | (one << (30 - fn.i32(bits.index)))
        enough = fn.compare(how_many(lambda k, _: fn.compare(k, "sge", fn.splat(least, LANES))), "sge", total)
        bits.give(fn.select(enough, least, bits.carried[0]))
    least = bits.results[0]
    level = how_many(lambda k, _: fn.compare(k, "eq", fn.splat(least, LANES)))
    room = total - how_many(lambda k, _: fn.compare(k, "sgt", fn.splat(least, LANES)))
    tied = fn.compare(level, "sgt", room)
    with fn.loop(0, fn.select(tied, fn.const(_BITS, "i64"), fn.const(0, "i64")), 1, [zero]) as bits:
        end = bits.carried[0] | (one << (30 - fn.i32(bits.index)))

        def before(k: Val, pos: Val, end: Val = end) -> Val:
            equal = fn.compare(k, "eq", fn.splat(least, LANES))
            return both(fn, equal, fn.compare(pos, "slt", fn.splat(end, LANES)))

        bits.give(fn.select(fn.compare(how_many(before), "slt", room), end, bits.carried[0]))
    last = fn.select(tied, bits.results[0], fn.const(_FAR, "i32"))

    def kept(place: Val) -> Val:
        k, pos = key(place, "i32")
        equal = both(fn, fn.compare(k, "eq", least), fn.compare(pos, "sle", last))
        above = fn.compare(k, "sgt", least)
        return fn.emit(f"arith.ori {above.name}, {equal.name} : i1", "i1")

    with fn.loop(0, n, 1, [fn.const(0, "i64")]) as slots:
        found = slots.carried[0]
        fn.store(fn.i32(slots.index), free, found)
        slots.give(fn.select(kept(slots.index), found, found + 1))
    with fn.loop(n, length, 1, [fn.const(0, "i64")]) as slots:
        found, stays = slots.carried[0], kept(slots.index)
        with fn.when(stays):
            to = fn.cast(fn.load(free, "i32", found), "arith.extsi", "i64")
            fn.store(fn.load(positions, "i32", slots.index), positions, to)
            for score in scores:
                fn.store(fn.load(score, "f32", slots.index), score, to)
            with fn.loop(first, first + count) as heads:
                _move(fn, site, state, heads.index * state.number("blocks"), slots.index, to)
        slots.give(fn.select(stays, found + 1, found))
    for name in ("len_k", "len_v"):
        fn.store(n, state.address(name), line)


def _move(fn: Fn, site: Lists, state: State, head: Val, source: Val, to: Val) -> None:
    """The key and the value of an entry, unchanged, within one head whose blocks begin at ``head``."""
    (a, i), (b, j) = ((head + x // LANES, x % LANES) for x in (source, to))
    for what, form, size in zip("kv", site.forms, (site.dim, site.vdim), strict=True):
        base = state.address(what)
        with fn.loop(0, size) as d:
            if what == "k":
                places = [(block * size + d.index) * LANES + lane for block, lane in ((a, i), (b, j))]
            else:
                places = [(block * LANES + lane) * size + d.index for block, lane in ((a, i), (b, j))]
            fn.store(fn.load(base, unit(form), places[0]), base, places[1])
        if scaled(form):
            base = state.address(f"{what}_scale")
            fn.store(fn.load(base, "f32", a * LANES + i), base, b * LANES + j)

