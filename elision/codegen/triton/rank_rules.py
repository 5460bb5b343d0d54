"""The launches of a page rank over tokens, and of what goes by it."""

from __future__ import annotations

from elision.codegen.triton.configs import power
from elision.codegen.triton.launches import Arg, Launches, axis, count, piece, real
from elision.codegen.triton.merge_rules import axis_of, nearest, starts, unit
from elision.codegen.triton.own_rules import looking
from elision.ir.ops.ranking import SETTLED, SPREAD
from elision.ir.value import Value


def pagerank(to: Launches, value: Value) -> None:
    """All rounds are launched; a sequence that has settled keeps its scores."""
    q = value.args[0]
    tokens, heads = to.plan.axis(q), q.tensor.sizes[0]
    args, looks = looking(to, value, {})
    new, old, settled = to.scratch(tokens, heads), to.scratch(tokens, heads), to.scratch(tokens, 1)
    start, fixed = {"start": axis(tokens, "start")}, dict(H=heads, HP=power(heads), BN=64)
    begin: dict[str, Arg | None] = {"weight": piece(new), "settled": piece(settled, "i32"), **start}
    to.launch("uniform", (("rows", 1),), begin, fixed, writes=[new, settled])
    for i in range(value.attr("rounds")):
        new, old = old, new
        some = args | {"score": piece(new), "weight": piece(old), "settled": piece(settled, "i32")}
        grid = (("longest", tokens, 32), ("rows", 1))
        to.launch("received", grid, some, looks | {"WEIGHTED": True}, writes=[new])
        if 0 < i < value.attr("rounds") - 1:
            check: dict[str, Arg | None] = {
                "settled": piece(settled, "i32"), "weight": piece(new), "before": piece(old), "least": real(SETTLED), **start,
            }  # fmt: skip
            to.launch("settle", (("rows", 1),), check, fixed, writes=[settled])
    out = to.new(value)
    last: dict[str, Arg | None] = {
        "score": to.tensor(value)[0], "weight": piece(new), "low": real(SPREAD[0]), "high": real(SPREAD[1]), **start,
    }  # fmt: skip
    to.launch("importance", (("rows", 1),), last, fixed, writes=[out.buffer])


def prune(to: Launches, value: Value) -> None:
    score, keys = value.args
    tokens, given = to.plan.axis(keys), starts(to, value) | {"twins": axis(axis_of(to, value), "twins")}
    fixed = dict(SKIP=value.attr("protect", 1), BN=1024)
    rows, width = unit(to, keys, "whole")
    side, stays = to.scratch(tokens, 1), to.scratch(tokens, 1)
    args: dict[str, Arg | None] = {"side": piece(side, "i32"), "score": to.whole(score), **given}
    to.launch("halves", (("rows", 1),), args, fixed, writes=[side])
    best, _ = nearest(to, rows, width, tokens, side)
    args = {"stays": piece(stays, "i32"), "side": piece(side, "i32"), "best": piece(best), **given}
    to.launch("remain", (("rows", 1),), args, fixed, writes=[stays])
    _, other = nearest(to, rows, width, tokens, stays)
    out = to.new(value)
    args = {"assign": to.tensor(value)[0], "stays": piece(stays, "i32"), "to": piece(other, "i64"), "count": count(tokens)}
    to.launch("stand", (("tokens", tokens, 256),), args, dict(BLOCK=256), writes=[out.buffer])
