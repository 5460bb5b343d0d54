"""The residual stream of a captured graph, its blocks and their templates.

The stream is read off the data flow alone: the immediate dominators of the result form a chain of values that
every path from the tokens to the result passes. A block is a step of that chain that offers a bypass (the
residual edge) around a dense operator. Names of modules and of weights are never looked at.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import networkx as nx
import torch
from torch import fx

from elision.errors import UnsupportedModel
from elision.frontend.attention import ATTENTION
from elision.frontend.normalise import operator_name
from elision.frontend.taint import Taint
from elision.frontend.template import Fingerprint, fingerprint

Role = Literal["attn", "mlp", "both", "other"]


@dataclass(frozen=True)
class Segment:
    """One block of the stream: ``end`` is computed from ``start`` and from ``externals``.

    ``nodes``: its token-dependent nodes in order, ``end`` included, ``start`` not. ``params``: the weights it
    reads and ``externals``: the position-only or earlier values it reads, both in order of first use, so two
    segments of one ``template`` correspond slot by slot (template number, from 0, in order of appearance).
    ``layer``: index of its layer, or None if it belongs to none.
    """

    start: fx.Node
    end: fx.Node
    nodes: tuple[fx.Node, ...]
    params: tuple[fx.Node, ...]
    externals: tuple[fx.Node, ...]
    template: int
    kind: Role
    layer: int | None


@dataclass(frozen=True)
class Structure:
    """``root`` is the first value of the stream (all before it is the prologue), ``stream`` the boundaries
    from ``root`` to the last block's end (all after it is the epilogue), ``segments[i]`` leads from
    ``stream[i]`` to ``stream[i + 1]``, and ``result`` is the model's output."""

    root: fx.Node
    stream: tuple[fx.Node, ...]
    segments: tuple[Segment, ...]
    result: fx.Node

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len({s.layer for s in self.segments} - {None})

    @property
    def templates(self) -> int:
        """Number of different templates."""
        return len({s.template for s in self.segments})


def find_structure(graph: fx.Graph, taint: Taint, result: fx.Node | None = None) -> Structure:
    """Structure of a normalised graph, for ``result`` (its first output). ``UnsupportedModel`` if it has no block."""
    result = _result(graph) if result is None else result
    chain = _dominators(graph, taint, result)
    order = list(graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    steps = [
        (k, body)
        for k, (a, b) in enumerate(zip(chain, chain[1:], strict=False))
        if _is_float(a) and _has_bypass(a, body := _body(order, place, taint, a, b), b) and _is_dense(body, taint)
    ]
    if not steps:
        raise UnsupportedModel(
            f"no residual block was found in a graph of {len(order)} nodes: expected a value that is "
            "both read by dense operators and added to their result. Models without residual connections "
            "cannot be raised"
        )
    ends = _ends(steps, chain, order, place, taint)
    stream = [chain[steps[0][0]], *(chain[e] for e in ends)]
    segments = _segments(stream, order, place, taint)
    return Structure(stream[0], tuple(stream), segments, result)


def _result(graph: fx.Graph) -> fx.Node:
    output = next(n for n in graph.nodes if n.op == "output")
    result: fx.Node = output.all_input_nodes[0]
    return result


def _dominators(graph: fx.Graph, taint: Taint, result: fx.Node) -> list[fx.Node]:
    """The values that every path from the token inputs to ``result`` passes, in order.

    Only token-dependent edges count: weights, masks and tables are cut, and so are the keys and values of
    attention, which are state (they may come from another layer).
    """
    flow: nx.DiGraph[fx.Node | str] = nx.DiGraph()
    source = "inputs"  # one node above all token inputs
    for node in graph.nodes:
        if not taint.token(node) or node.op == "output":
            continue
        if node.op == "placeholder":
            flow.add_edge(source, node)
        for used in data_inputs(node):
            if taint.token(used):
                flow.add_edge(used, node)
    before = nx.ancestors(flow, result) if result in flow else set()
    if source not in before:
        what = "at all" if result not in flow else "but through keys and values of attention only"
        raise UnsupportedModel(f"the model's first output does not depend on its inputs {what}")
    parent = nx.immediate_dominators(flow.subgraph(before | {result}), source)
    chain = [result]
    while isinstance(above := parent[chain[-1]], fx.Node):
        chain.append(above)
    return chain[::-1]


def data_inputs(node: fx.Node) -> list[fx.Node]:
    """What the node reads, without the keys and values of attention."""
    state = node.args[1:3] if is_attention(node) else ()
    return [used for used in node.all_input_nodes if used not in state or used is node.args[0]]


def between(taint: Taint, start: fx.Node | None, end: fx.Node) -> tuple[fx.Node, ...]:
    """Token nodes that ``end`` needs, after ``start``, in order."""
    needed: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node is start or node in needed or not taint.token(node) or node.op == "placeholder":
            continue
        needed.add(node)
        stack.extend(node.all_input_nodes)
    return tuple(sorted(needed))


def is_attention(node: fx.Node) -> bool:
    """``elision::attention`` or torch's ``scaled_dot_product_attention``: arguments begin with q, k, v."""
    return node.target is ATTENTION or operator_name(node) == "aten::scaled_dot_product_attention"


def attends(node: fx.Node) -> bool:
    """Attention, also spelled out: a softmax over an axis whose length varies."""
    if is_attention(node):
        return True
    value = node.meta.get("val")
    if operator_name(node) not in ("aten::softmax", "aten::_softmax") or not isinstance(value, torch.Tensor):
        return False
    return not isinstance(value.shape[int(node.args[1])], int)  # type: ignore[arg-type]


def _body(order: list[fx.Node], place: dict[fx.Node, int], taint: Taint, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Token-dependent nodes that are computed from ``start`` and that ``end`` needs, in order."""
    between = order[place[start] + 1 : place[end] + 1]
    reached = {start}
    for node in between:
        if taint.token(node) and any(used in reached for used in node.all_input_nodes):
            reached.add(node)
    needed = {end}
    for node in reversed(between):
        if node in needed and node in reached:
            needed.update(node.all_input_nodes)
    return [node for node in between if node in needed and node in reached]


def _has_bypass(start: fx.Node, body: list[fx.Node], end: fx.Node) -> bool:
    return len(body) > 1 and sum(start in node.all_input_nodes for node in body) > 1


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_dense(body: list[fx.Node], taint: Taint) -> bool:
    return any(_reads_weight(node, taint) for node in body)


def _reads_weight(node: fx.Node, taint: Taint) -> bool:
    """A matrix (or an expression of weights that is one) takes part: norms and biases read vectors only."""
    for used in node.all_input_nodes:
        value = used.meta.get("val")
        if taint[used] == {"param"} and isinstance(value, torch.Tensor) and value.dim() >= 2:
            return True
    return False


def _ends(
    steps: list[tuple[int, list[fx.Node]]],
    chain: list[fx.Node],
    order: list[fx.Node],
    place: dict[fx.Node, int],
    taint: Taint,
) -> list[int]:
    """Index in the chain of each block's end: where the next block begins.

    So the norm of a post-norm model, which follows the sum, belongs to its block. The last block has no
    successor: it takes as many further values as the last earlier block like it took.
    """
    ends = [k for k, _ in steps[1:]]
    last = steps[-1][0]

    def print_of(step: int, stop: int) -> str:
        body = _body(order, place, taint, chain[step], chain[stop])
        return fingerprint(chain[step], body, taint).text

    for (step, _), end in reversed(list(zip(steps[:-1], ends, strict=True))):
        stop = last + end - step
        if stop < len(chain) and print_of(step, end) == print_of(last, stop):
            return [*ends, stop]
    return [*ends, last + 1]


def _segments(stream: list[fx.Node], order: list[fx.Node], place: dict[fx.Node, int], taint: Taint) -> tuple[Segment, ...]:
    numbers: dict[str, int] = {}
    parts: list[tuple[fx.Node, fx.Node, list[fx.Node], Fingerprint, int]] = []
    for a, b in zip(stream, stream[1:], strict=False):
        body = _body(order, place, taint, a, b)
        mark = fingerprint(a, body, taint)
        parts.append((a, b, body, mark, numbers.setdefault(mark.text, len(numbers))))
    kinds = [_kind(body, taint) for _, _, body, _, _ in parts]
    layers = _layers(kinds)
    return tuple(
        Segment(
            a,
            b,
            tuple(body),
            mark.params,
            mark.externals,
            template,
            kind if layer is not None else "other",
            layer,
        )
        for (a, b, body, mark, template), kind, layer in zip(parts, kinds, layers, strict=True)
    )


def _kind(body: list[fx.Node], taint: Taint) -> Role:
    """``both`` if, beside attention, at least two dense operators in sequence neither feed it nor follow it
    (one alone may be a gate on the attention's output)."""
    sites = {node for node in body if attends(node)}
    if not sites:
        return "mlp"
    after, before = set(sites), set(sites)
    for node in body:
        if any(used in after for used in node.all_input_nodes):
            after.add(node)
    for node in reversed(body):
        if node in before:
            before.update(node.all_input_nodes)
    depth: Counter[fx.Node] = Counter()
    for node in body:
        if node not in after and node not in before:
            above = max((depth[used] for used in node.all_input_nodes), default=0)
            depth[node] = above + _reads_weight(node, taint)
    return "both" if max(depth.values(), default=0) >= 2 else "attn"


def _layers(kinds: list[Role]) -> list[int | None]:
    """A layer is one repeat of the period of ``kinds``; without one, each attention begins a layer."""
    count = len(kinds)
    if not any(kind in ("attn", "both") for kind in kinds):
        return [None] * count
    for period in range(1, count // 2 + 1):
        if count % period == 0 and all(kinds[i] == kinds[i % period] for i in range(count)):
            return [i // period for i in range(count)]
    layers: list[int | None] = []
    current: int | None = None
    for kind in kinds:
        if kind in ("attn", "both"):
            current = 0 if current is None else current + 1
        layers.append(current)
    return layers
