"""The launches of the clock: caches that keep the best of their entries."""

from __future__ import annotations

from typing import Any

from elision.codegen.refusal import need
from elision.codegen.triton.attention_rules import lists, moves, planes_of, readable
from elision.codegen.triton.flush_rules import flush
from elision.codegen.triton.launches import Arg, Launches, axis, cache, integer, size
from elision.codegen.triton.page_rules import summarise
from elision.ir.program import Tick
from elision.ir.states import KV, Budget
from elision.ir.value import Value


def evictions(to: Launches, tick: Tick) -> None:
    """The launches of a tick, axis 0 being the sequences that are due. Raises NotNative for one that does anything but keep the
    best entries of caches, by score or by position, summarise their pages, or encode what is older."""
    for value in (v for v in tick.graph.outputs if v.op != "input"):
        if value.op == "summarise" and value.args[0].op == "input" and isinstance(value.type, KV):
            summarise(to, tick.graph.names[value.args[0]], value.type)
            continue
        if value.op == "flush" and value.args[0].op == value.args[1].op == "input" and isinstance(value.type, KV):
            flush(to, tick.graph.names[value.args[0]], value)
            continue
        need(value.op == "select" and value.args[0].op == "input" and value.args[1].op == "keep", f"{value.op} on the clock")
        need(not value.attr("renumber"), "positions that are counted anew")
        _evict(to, tick, value.args[0], value.args[1])


def _evict(to: Launches, tick: Tick, state: Value, keep: Value) -> None:
    type, name = state.type, tick.graph.names[state]
    assert isinstance(type, KV)
    readable(type)
    need(len(type.main) == 1, "a choice among entries of two segments")
    need(isinstance(type.main[-1].slots, Budget) and type.keyed_by == "explicit", "a cache that keeps the order of its entries")
    score, pos = keep.args
    pool, pool_recent = 1, 0
    if score.op == "pool":
        need(tick.every == 0 and not tick.chunks, "neighbours of entries that have moved")
        pool, pool_recent, score = score.attr("size"), score.attr("recent", 0), score.args[0]
    need(pos.op == "entries" and (score is pos or score.op == "scored" and score.attr("which", "score") == "score"), score.op)
    need(type.scores is None or len(type.scores.arrays) == 1, "two scores of an entry")
    scored, each, n = score is not pos, lists(type), keep.attr("n")
    pairs: dict[str, Arg | None] = {m: Arg(("round", m, each * n), "*i64") for m in ("source", "target")}
    scores = cache(name, type, "score") if type.scores is not None else None
    args: dict[str, Arg | None] = {
        **pairs, "score": scores if scored else None, "pos": cache(name, type, "pos"), "start": axis(0, "start"),
        "length": cache(name, type, "len_k"), "other": cache(name, type, "len_v"), "entries": size(name, "entries"),
        "wide": size(name, "wide"), "n": integer(n),
        **{what: integer(keep.attr(what, 0)) for what in ("recent", "sinks")},
    }  # fmt: skip
    fixed: dict[str, Any] = dict(H=type.heads, LISTS=each, SCORED=scored, POOL=pool, POOL_RECENT=pool_recent, BN=1024)
    to.launch("evict", (("rows", each),), args, fixed, reads=[name], writes=[name, "round"], warps=4)
    args = {
        **planes_of(name, type, "", "to_"), **planes_of(name, type, "", "from_"), "to_pos": cache(name, type, "pos"),
        "from_pos": cache(name, type, "pos"), **pairs, "older": None, "n": integer(n), "to_capacity": size(name, "capacity"),
        "from_capacity": size(name, "capacity"), "to_entries": size(name, "entries"), "from_entries": size(name, "entries"),
    }  # fmt: skip
    fixed = moves(type) | dict(FROM_LISTS=each, SHARED=False, AFTER=False)
    grid = (("over", name, n, 1), ("rows", type.heads))
    to.launch("move", grid, args, fixed, reads=[name, "round"], writes=[name], warps=1)
    if scores is not None:
        args = {"score": scores, **pairs, "wide": size(name, "wide"), "n": integer(n)}
        grid = (("over", name, n, 128), ("rows", type.heads))
        to.launch("move_scores", grid, args, dict(H=type.heads, LISTS=each, BN=128), reads=["round"], writes=[name], warps=1)
