"""How an image becomes a stream: patches through a linear map, a table of positions, and tokens put before them.

Only the convolution is looked for. What comes after it, up to the stream, is found by evaluation: it must put the convolution's
results in their places and add constants, whatever operators it uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from elision.errors import UnsupportedModel
from elision.frontend.anchors import close
from elision.frontend.capture import Captured
from elision.frontend.evaluate import evaluate
from elision.frontend.normalise import operator_name
from elision.frontend.operands import Operands
from elision.frontend.token_major import Layouts
from elision.ir.types import Axis, parse_dtype
from elision.ir.types import Tensor as TensorType
from elision.ir.value import Builder, Value


@dataclass(frozen=True, eq=False)
class Patches:
    """``end`` is the stream ``[B, k + n, width]``: ``first [k, width]``, then the ``n`` patches of ``pixels``, mapped by
    ``weight`` (a convolution's) and ``bias``, plus ``table [n, width]``. ``size``: height and width of a patch."""

    pixels: fx.Node
    end: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    size: tuple[int, int]
    first: Tensor
    table: Tensor


def find_patches(captured: Captured, layouts: Layouts, nodes: tuple[fx.Node, ...]) -> Patches | None:
    """The patches among the nodes before the stream, as far towards it as they go; None if there are none."""
    for conv in nodes:
        size = _patch_size(conv)
        pixels = conv.args[0] if size is not None else None
        if size is None or not isinstance(pixels, fx.Node) or captured.kinds.get(pixels.name) != "token":
            continue
        weight, bias = (*conv.args[1:3], None)[:2]
        assert isinstance(weight, fx.Node)
        for end in reversed([n for n in nodes if n > conv]):
            found = _placed(captured, layouts, conv, end)
            if found is not None:
                return Patches(pixels, end, weight, bias if isinstance(bias, fx.Node) else None, size, *found)
    return None


def _patch_size(node: fx.Node) -> tuple[int, int] | None:
    """Height and width of the kernel of a convolution whose windows touch and do not overlap."""
    if operator_name(node) != "aten::conv2d" or node.kwargs:
        return None
    stride, padding, dilation, groups = (*node.args, *([1, 1], [0, 0], [1, 1], 1)[len(node.args) - 3 :])[3:7]
    height, width = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    whole = _pair(stride) == (height, width) and _pair(padding) == (0, 0) and _pair(dilation) == (1, 1) and groups == 1
    return (height, width) if whole else None


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) * (2 // len(value)) if isinstance(value, list | tuple) else (value, value)


def _placed(captured: Captured, layouts: Layouts, conv: fx.Node, end: fx.Node) -> tuple[Tensor, Tensor] | None:
    """The constants before the patches and those added to them, if ``end`` is nothing else; None if it is."""
    layout, (width, down, across) = layouts.of(end), conv.meta["val"].shape[1:]
    count = down * across
    total = layouts.length(count)
    if layout is None or not layout.leading or layout.merged or layout.features != (width,) or total < count:
        return None
    nowhere = torch.zeros(2, total, dtype=torch.int64)

    def run(results: Tensor, wide: bool) -> Tensor:
        found: Tensor = evaluate(captured, [end], nowhere, given={conv: results}, wide=wide)[0]
        return found

    shape = (2, width, down, across)
    base = run(torch.zeros(shape, dtype=torch.float64), True)
    for seed in (0, 1):
        y = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        want = base.clone()
        want[:, total - count :] += y.flatten(2).mT
        if not (close(run(y, True), want) and close(base[0], base[1])):
            return None
    exact = run(torch.zeros(shape, dtype=conv.meta["val"].dtype), False)[0]
    return exact[: total - count].contiguous(), exact[total - count :].contiguous()


def entry_inputs(b: Builder, captured: Captured, layouts: Layouts, patches: Patches | None) -> dict[fx.Node, Value]:
    """The inputs of the program's entry by captured input: the first token ids are ``ids``, others keep their names; images
    are on an axis of their own. Raises UnsupportedModel for an input that is neither one value per token nor an image."""
    found: dict[fx.Node, Value] = {}
    for node in captured.graph.nodes:
        if captured.kinds.get(node.name) != "token":
            continue
        value, layout = node.meta["val"], layouts.of(node)
        dtype = parse_dtype(value.dtype)
        if patches is not None and node is patches.pixels:
            type = TensorType((Axis("b"), *map(int, value.shape[1:])), dtype)
        elif layout is None or layout.merged:
            raise UnsupportedModel(f"the input {node.name} is neither one value per token nor an image cut into patches")
        else:
            type = TensorType((Axis("t"), *layout.features), dtype)
        found[node] = b.input("ids" if not found and dtype == "i64" else node.name, type)
    return found


def lower_patches(b: Builder, patches: Patches, pixels: Value, captured: Captured, operands: Operands) -> Value:
    """The stream that an image begins as."""

    def weight(name: str, values: Tensor) -> Value:
        operands.store(name, values)
        return b.param(name, operands.type(name))

    def add(op: str, *args: Value, **attrs: Any) -> Value:
        value = b.add(op, *args, **attrs)
        assert isinstance(value, Value)
        return value

    name = captured.source[patches.weight.name]
    (height, width), kernel = patches.size, weight(f"{name}.flat", captured.params[name].flatten(1))
    cut = add("patches", pixels, height=height, width=width, axis="p" if len(patches.first) else "t", name="patches")
    bias = [b.param(n, operands.type(n)) for n in [operands.weight(patches.bias)]] if patches.bias is not None else []
    h = add("linear", cut, kernel, *bias, name="h")
    if bool(patches.table.any()):
        places = add("embed", add("positions", cut, name="pos"), weight("patches.positions", patches.table), name="positions")
        h = add("map", h, places, expr="x0 + x1", name="h")
    if len(patches.first):
        room = add("extended", h, k=len(patches.first), axis="t", name="room")
        h = add("prepend", h, weight("patches.first", patches.first), room, name="h")
    return h
