"""When two programs are the same program: a form without the names that a model happens to give."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from elision.ir.program import Program
from elision.ir.value import Graph, Value


def canonical(program: Program) -> Any:
    """Equal for programs of equal structure: parameters, states and templates are numbered by first use in the entries, layers by
    their place in the stream; the program's name, applied passes and quality do not count."""
    names = _Names()
    entries = [_graph(g, names) for g in program.entries.values()]
    templates = [_graph(program.templates[t], names) for t in list(names.of["target"]) if t in program.templates]
    params = [program.params[p] for p in names.of["param"]]
    states = [program.states[s] for s in names.of["state"]]
    ticks = [(t.every, t.chunks, _graph(t.graph, names)) for t in program.ticks]
    round_ = _graph(program.round, names) if program.round is not None else None
    edits = [_graph(g, names) for g in program.edits]
    return list(program.entries), entries, templates, params, states, ticks, round_, edits


class _Names:
    """Numbers names by kind, in order of first use."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, int]] = {"param": {}, "state": {}, "target": {}, "layer": {}}

    def number(self, kind: str, name: str) -> int:
        table = self.of[kind]
        return table.setdefault(name, len(table))


def _graph(graph: Graph, names: _Names) -> list[Any]:
    number = {v: i for i, v in enumerate(_order(graph))}
    rows: list[Any] = []
    for v in number:
        attrs = dict(v.attrs)
        if v.op == "param":
            attrs = {"param": names.number("param", attrs["name"])}
        elif v.op == "input" and v.is_state:
            attrs = {"state": names.number("state", attrs["name"])} if graph.name not in names.of["target"] else {}
        elif v.op == "input":
            attrs = {}
        if "target" in attrs:
            attrs["target"] = names.number("target", attrs["target"])
        if match := re.match(r"(\d+)(\..*)", attrs.get("label", "")):
            attrs["label"] = f"{names.number('layer', match[1])}{match[2]}"
        rows.append((v.op, [number[a] for a in v.args], sorted(attrs.items()), v.type))
    return [rows, [number[v] for v in graph.outputs]]


def _order(graph: Graph) -> Iterator[Value]:
    """Every value once, parameters where they are first read."""
    seen: set[Value] = set()
    for v in graph.values:
        for found in (*(a for a in v.args if a.op == "param"), *(() if v.op == "param" else (v,))):
            if found not in seen:
                seen.add(found)
                yield found
