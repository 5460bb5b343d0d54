"""The launches of tokens that are merged or left out. How many stay of a sequence is known (`elision.ir.kept`): the runtime lays
out their axis before the first launch, and which they are is found on the device."""

from __future__ import annotations

from math import prod

import torch

from elision.codegen.refusal import need
from elision.codegen.triton import own_rules
from elision.codegen.triton.configs import power
from elision.codegen.triton.launches import Arg, Launches, axis, count, piece
from elision.ir.kept import is_counted
from elision.ir.types import DTYPES
from elision.ir.value import Value

_RUN = 1024  # tokens that a program looks at together


def axis_of(to: Launches, value: Value) -> int:
    """The axis of what stays by the operand of `clusters` or `which`."""
    users = [v for v in to.users[value] if v.op in ("clusters", "which")]
    need(len(users) == 1, f"{value.op} that is no axis of tokens")
    return to.plan.axis(users[0])


def starts(to: Launches, value: Value) -> dict[str, Arg]:
    return {"start": axis(to.plan.axis(value), "start"), "kept": axis(axis_of(to, value), "start")}


def match(to: Launches, value: Value) -> None:
    keys, heads = value.args[0], value.attr("heads", False)
    tokens, given = to.plan.axis(keys), starts(to, value)
    rows, width = unit(to, keys, "heads" if heads else "mean")
    best, other = nearest(to, rows, width, tokens, None)
    out = to.new(value)
    args: dict[str, Arg | None] = {
        "assign": to.tensor(value)[0], "best": piece(best), "to": piece(other, "i64"), **given,
    }  # fmt: skip
    to.launch("join_similar", (("rows", 1),), args, dict(SKIP=value.attr("protect", 1), BN=_RUN), writes=[out.buffer])


def unit(to: Launches, keys: Value, form: str) -> tuple[int, int]:
    """Keys of length 1, and how many channels they have."""
    heads, dim = keys.tensor.sizes
    width, tokens = dim if form == "mean" else heads * dim, to.plan.axis(keys)
    source, stride = to.tensor(keys)
    rows = to.scratch(tokens, width)
    args: dict[str, Arg | None] = {"y": piece(rows), "x": source, "x_stride": stride}
    fixed = dict(H=heads, D=dim, HP=power(heads), DP=power(dim), FORM=form)
    to.launch("unit", (("tokens", tokens, 1),), args, fixed, writes=[rows])
    return rows, width


def nearest(to: Launches, rows: int, width: int, tokens: int, side: int | None) -> tuple[int, int]:
    best, other = to.scratch(tokens, 1), to.scratch(tokens, 1, 8)
    args = {
        "best": piece(best), "to": piece(other, "i64"), "x": piece(rows), "side": None if side is None else piece(side, "i32"),
        "start": axis(tokens, "start"),
    }  # fmt: skip
    fixed = dict(W=width, SIDED=side is not None, BM=32, BN=32, BK=32)
    to.launch("nearest", (("longest", tokens, 32), ("rows", 1)), args, fixed, writes=[best, other])
    return best, other


def fuse(to: Launches, value: Value) -> None:
    given, score = starts(to, value), to.whole(value.args[0])
    out = to.new(value)
    args: dict[str, Arg | None] = {"assign": to.tensor(value)[0], "score": score, **given}
    to.launch("join_rest", (("rows", 1),), args, dict(FIRST=value.attr("protect", 1), BN=_RUN), writes=[out.buffer])


def foremost(to: Launches, value: Value) -> None:
    given, score = starts(to, value), to.whole(value.args[0])
    out = to.new(value)
    args: dict[str, Arg | None] = {"mask": to.tensor(value)[0], "score": score, **given}
    fixed = dict(FIRST=value.attr("first", 1), LAST=value.attr("last", 1), BN=_RUN)
    to.launch("stays", (("rows", 1),), args, fixed, writes=[out.buffer])


def compact(to: Launches, value: Value) -> None:
    """The axis of what stays."""
    given = value.args[0]
    need(is_counted(given), f"an axis of as many tokens as {given.op} says")
    tokens, kept = to.plan.axis(given), to.plan.axes(value)
    to.counted.add(kept)
    place = to.places[value] = to.scratch(tokens, 1, 8)
    args: dict[str, Arg | None] = {
        "index": axis(kept, "index"), "to_pos": axis(kept, "pos"), "place": piece(place, "i64"), "chosen": to.whole(given),
        "pos": axis(tokens, "pos"), "start": axis(tokens, "start"), "kept": axis(kept, "start"),
    }  # fmt: skip
    to.launch("compact", (("rows", 1),), args, dict(ASSIGN=value.op == "clusters", BN=_RUN), writes=[place])


def joined(to: Launches, value: Value) -> None:
    assign, kept = value.args
    tokens, out = to.plan.axis(value), to.new(value)
    args: dict[str, Arg | None] = {
        "y": to.tensor(value)[0], "assign": to.whole(assign), "place": piece(to.places[kept], "i64"), "count": count(tokens),
    }  # fmt: skip
    to.launch("joined", (("tokens", tokens, 256),), args, dict(BLOCK=256), writes=[out.buffer])


def merge(to: Launches, value: Value) -> None:
    """The mean of what is merged, or (`collect`) its sum."""
    x, assign, *weights, _ = value.args
    width = prod(d for d in x.tensor.features if isinstance(d, int))
    kept, out = to.plan.axis(value), to.new(value)
    args: dict[str, Arg | None] = {
        "y": to.tensor(value)[0], "x": to.whole(x), "assign": to.whole(assign),
        "weight": to.whole(weights[0]) if weights else None, "index": axis(kept, "index"), "row": axis(kept, "row"),
        "start": axis(to.plan.axis(x), "start"),
    }  # fmt: skip
    block = min(128, power(width))
    grid = (("tokens", kept, 1), -(-width // block))
    to.launch("merge", grid, args, dict(K=width, WEIGHTED=bool(weights), BN=32, BK=block), writes=[out.buffer])


def gather(to: Launches, value: Value) -> None:
    x, index = value.args
    width = prod(d for d in x.tensor.features if isinstance(d, int))
    out, block = to.new(value), min(1024, power(width))
    args: dict[str, Arg | None] = {"y": to.tensor(value)[0], "x": to.whole(x), "index": to.whole(index)}
    grid = (("tokens", to.plan.axis(value), 1), -(-width // block))
    to.launch("restrict", grid, args, dict(K=width, BK=block), writes=[out.buffer])


def received(to: Launches, value: Value) -> None:
    """What the last tokens look at."""
    own_rules.received(to, value, {"LAST": value.attr("last", 1)}, 0.0)


def regard(to: Launches, value: Value) -> None:
    """What the first token looks at."""
    own_rules.received(to, value, {"FIRST": 1}, torch.finfo(DTYPES[value.tensor.dtype]).tiny ** 0.5)
