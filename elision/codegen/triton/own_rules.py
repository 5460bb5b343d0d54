"""The launches of attention to the call's own tokens, and of what they receive of it. A cache that lives for one call is never
made: its keys and values are read where they were computed."""

from __future__ import annotations

from typing import Any

from elision.codegen.refusal import need
from elision.codegen.triton.configs import attention, power
from elision.codegen.triton.launches import Arg, Launches, axis, integer, piece, plain, real
from elision.ir.mask import Mask
from elision.ir.states import KV, Dense, Float
from elision.ir.types import DTYPES
from elision.ir.value import Value


def fresh(to: Launches, value: Value) -> None:
    """Keys and values stay where they are."""
    to.plan.cache(value, native=False)
    _readable(to, value)


def _readable(to: Launches, value: Value) -> None:
    k, v = value.args[-2:]
    state = value.type
    assert isinstance(state, KV)
    main = state.main[-1]
    need(len(state.main) == 1 and isinstance(main.slots, Dense), "a cache of the call's own that is not all of its tokens")
    for encoding in (main.k, main.v):
        wide = isinstance(encoding, Float) and DTYPES[encoding.dtype].itemsize >= k.tensor.itemsize
        need(wide, f"a cache of the call's own with entries stored as {encoding}")
    for rows in (k, v):
        to.tensor(rows)


def empty(to: Launches, value: Value) -> None:
    """Nothing, until something is appended."""
    to.plan.cache(value, native=False)


def append(to: Launches, value: Value) -> None:
    need(value.args[0].op == "empty", "a cache of the call's own that is appended to twice")
    to.plan.follow(value, value.args[0])
    _readable(to, value)


def attend(to: Launches, value: Value) -> None:
    q, cached = value.args[:2]
    mask, state = value.attr("mask"), cached.type
    assert isinstance(state, KV) and isinstance(mask, Mask)
    need(cached.op in ("fresh", "append"), "attention to an empty cache")
    k, v = cached.args[-2:]
    named = dict(zip(value.attr("extras") or (), value.args[2:], strict=True))
    need(not value.attr("results") and "pages" not in named, "results beside the output, or pages of the call's own tokens")
    need(q.tensor.tokens == k.tensor.tokens, "attention to other tokens than those that ask")
    tokens, heads, per = to.plan.axis(q), q.tensor.sizes[0], q.tensor.sizes[0] // state.heads
    wide, itemsize = max(state.dim, state.vdim), DTYPES[q.tensor.dtype].itemsize
    tile = attention("many", power(per), False, wide, itemsize)
    rows = max(16, power(per)) if itemsize > 2 and wide > 64 else tile.m  # float32 takes twice the registers
    given: dict[str, Any] = {}
    for name, each in (("q", q), ("k", k), ("v", v)):
        given[name], given[f"{name}_stride"] = to.tensor(each)
    out = to.new(value)
    args: dict[str, Arg | None] = {
        "out": to.tensor(value)[0], **given, "pos": axis(tokens, "pos"), "start": axis(tokens, "start"),
        **{name: plain(named[name]) if name in named else None for name in ("slopes", "sinks")},
        "scale": real(float(value.attr("scale"))), "softcap": real(float(value.attr("softcap") or 0.0)),
        "size": integer(mask.size), "first_seen": integer(mask.sinks),
    }  # fmt: skip
    fixed = dict(
        H=state.heads, G=per, GP=power(per), D=state.dim, DV=state.vdim, DP=max(16, power(state.dim)),
        DVP=max(16, power(state.vdim)), MASK=mask.kind, SOFTCAP=bool(value.attr("softcap")), SLOPES="slopes" in named,
        SINKS="sinks" in named, BM=rows, BN=tile.n,
    )  # fmt: skip
    assert heads == per * state.heads
    grid = (("longest", tokens, rows // power(per)), ("rows", state.heads))
    to.launch("attend_own", grid, args, fixed, writes=[out.buffer], warps=tile.warps, stages=tile.stages)


def looking(to: Launches, value: Value, who: dict[str, int]) -> tuple[dict[str, Arg | None], dict[str, Any]]:
    """The log-sum-exp of ``who`` looks: the ``FIRST`` or the ``LAST`` so many of a sequence, or all. Result: the arguments and
    constants by which `received` says what tokens receive of them."""
    q, k, *extra = value.args
    mask, names = value.attr("mask", Mask("full")), value.attr("extras") or ()
    named = dict(zip(names or ["sized"] * len(extra), extra, strict=True))
    tokens, (heads, dim), of_keys = to.plan.axis(q), q.tensor.sizes, k.tensor.sizes[0]
    per, given = heads // of_keys, dict[str, Arg | None]()
    for name, rows in (("q", q), ("k", k)):
        given[name], given[f"{name}_stride"] = to.tensor(rows)
    lse = to.scratch(tokens, heads)
    args: dict[str, Arg | None] = {
        "lse": piece(lse), **given, "pos": axis(tokens, "pos"), "start": axis(tokens, "start"),
        "slopes": plain(named["slopes"]) if "slopes" in named else None,
        "sized": to.whole(named["sized"]) if "sized" in named else None, "scale": real(float(value.attr("scale"))),
        "softcap": real(float(value.attr("softcap") or 0.0)), "size": integer(mask.size), "first_seen": integer(mask.sinks),
    }  # fmt: skip
    fixed = dict(
        H=of_keys, G=per, GP=power(per), D=dim, DP=max(16, power(dim)), MASK=mask.kind, SOFTCAP=bool(value.attr("softcap")),
        SLOPES="slopes" in named, SIZED="sized" in named, FIRST=0, LAST=0, BM=max(16, power(per)), BN=32,
    ) | who  # fmt: skip
    few, tile = max(who.values(), default=0), fixed["BM"] // power(per)
    grid: tuple[Any, ...] = (-(-few // tile) if few else ("longest", tokens, tile), ("rows", of_keys))
    sinks = plain(named["sinks"]) if "sinks" in named else None
    to.launch("looks", grid, args | {"sinks": sinks}, fixed | {"SINKS": sinks is not None}, writes=[lse])
    none: dict[str, Arg | None] = {"weight": None, "settled": None, "least": real(0.0)}
    return args | none, fixed | {"WEIGHTED": False, "BM": 16}


def received(to: Launches, value: Value, who: dict[str, int], least: float) -> None:
    """What tokens receive of the attention of ``who`` looks, on average."""
    args, fixed = looking(to, value, who)
    out = to.new(value)
    args |= {"score": to.tensor(value)[0], "least": real(least)}
    to.launch("received", (("longest", to.plan.axis(value), 32), ("rows", 1)), args, fixed, writes=[out.buffer])
