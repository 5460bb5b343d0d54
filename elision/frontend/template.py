"""When two blocks are the same computation on different weights: a canonical text of a sub-graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from elision.frontend.taint import Taint


@dataclass(frozen=True)
class Fingerprint:
    """``text`` is equal for isomorphic sub-graphs; ``params`` and ``externals`` are their slots in order."""

    text: str
    params: tuple[fx.Node, ...]
    externals: tuple[fx.Node, ...]


def fingerprint(start: fx.Node, body: list[fx.Node], taint: Taint) -> Fingerprint:
    """Canonical form of ``body`` (in topological order), a function of ``start`` and what else it reads.

    It holds operators, attributes, shapes and types of the weights, and of each external value its class
    (depends on positions, on tokens, or is constant), rank and type. Which mask or table an external is, is
    not part of it: that is data of the block (two layers may differ by their mask alone). Expressions of
    weights alone are written out down to the weights; sizes are written by what they measure.
    """
    names: dict[fx.Node, str] = {start: "start"}
    params: dict[fx.Node, str] = {}
    externals: dict[fx.Node, str] = {}

    def leaf(node: fx.Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            return f"size({value.node.expr})"
        if node.op == "placeholder" and taint.param_only(node):
            return params.setdefault(node, f"param{len(params)}:{describe(value)}")
        if taint.param_only(node) and taint[node]:
            return call(node)
        kind = "token" if taint.token(node) else "position" if taint[node] else "constant"
        return externals.setdefault(node, f"external{len(externals)}:{kind}:{describe(value)}")

    def write(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value] if value in names else leaf(value)
        if isinstance(value, (list, tuple)):
            return "[" + ",".join(map(write, value)) + "]"
        return repr(value)

    def call(node: fx.Node) -> str:
        keywords = ",".join(f"{k}={write(v)}" for k, v in sorted(node.kwargs.items()))
        return f"{node.target}({','.join(map(write, node.args))};{keywords})"

    lines = []
    for index, node in enumerate(body):
        lines.append(call(node))
        names[node] = f"%{index}"
    return Fingerprint("\n".join(lines), tuple(params), tuple(externals))


def describe(value: Any) -> str:
    """Shape and type of a value; lengths that vary are written ``?``."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    sizes = ",".join(str(n) if isinstance(n, int) else "?" for n in value.shape)
    return f"[{sizes}]{str(value.dtype).removeprefix('torch.')}"
