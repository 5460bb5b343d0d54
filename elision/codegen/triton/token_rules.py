"""The launches of ops that make token axes, or go from one to another."""

from __future__ import annotations

from math import prod

from elision.codegen.refusal import need
from elision.codegen.triton.configs import power
from elision.codegen.triton.launches import Arg, Launches, axis, plain
from elision.ir.value import Value


def chosen(to: Launches, value: Value) -> None:
    """Which token of each sequence it is follows from how many there are; its position may be known on the device only."""
    before, made = to.plan.axis(value.args[0]), to.plan.axes(value)
    if before in to.counted:
        to.counted.add(made)
        args: dict[str, Arg | None] = {"y": axis(made, "pos"), "x": axis(before, "pos"), "index": axis(made, "index")}
        to.launch("restrict", (("tokens", made, 1), 1), args, dict(K=1, BK=1))


def patches(to: Launches, value: Value) -> None:
    images, (high, wide) = value.args[0], (value.attr("height"), value.attr("width"))
    need(images.op == "input", "patches of what is computed")
    to.plan.axes(value)
    channels, height, width = images.tensor.sizes
    out = to.new(value)
    args: dict[str, Arg | None] = {"y": to.tensor(value)[0], "x": to.tensor(images)[0]}
    block = min(1024, power(channels * high * wide))
    fixed = dict(IMAGE_H=height, IMAGE_W=width, C=channels, H=high, W=wide, BK=block)
    count = (height // high) * (width // wide)
    grid = (count, ("tokens", to.plan.axis(images), 1), -(-channels * high * wide // block))
    to.launch("patches", grid, args, fixed, writes=[out.buffer])


def extended(to: Launches, value: Value) -> None:
    to.plan.axes(value)


def prepend(to: Launches, value: Value) -> None:
    x, before, index = value.args
    need(index.op == "extended", "tokens that are put before others by a computed index")
    width = prod(d for d in x.tensor.features if isinstance(d, int))
    out = to.new(value)
    args: dict[str, Arg | None] = {
        "y": to.tensor(value)[0], "x": to.whole(x), "first": plain(before), "index": axis(to.plan.axis(value), "index"),
    }  # fmt: skip
    block = min(1024, power(width))
    fixed = dict(N=before.tensor.sizes[0], K=width, BK=block)
    grid = (("tokens", to.plan.axis(value), 1), -(-width // block))
    to.launch("prepend", grid, args, fixed, writes=[out.buffer])
