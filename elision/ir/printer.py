"""Programs as readable text, in a syntactic subset of Python, stable enough for golden tests. `elision.ir.parser` reads it back.

One line is one value; types stand in comments, since the parser infers them again. Parameters are written where they are
used, and every distinct cache type once, under a short name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from elision.errors import BadInput
from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.states import KV, Array
from elision.ir.types import Tensor
from elision.ir.value import Env, Graph, Value

VERSION = 1


def print_program(program: Program) -> str:
    """The text of a whole program."""
    aliases = _aliases(program)
    head = {
        "name": program.name,
        "version": VERSION,
        "quality": program.quality,
        "applied": program.applied,
        "meta": tuple(sorted(program.meta.items())),
    }
    lines = [f"program({', '.join(f'{k}={atom(v)}' for k, v in head.items())})", ""]
    lines += [f"{alias} = {atom(type)}" for type, alias in aliases.items()]
    lines += [f"param({atom(name)}, {atom(type)})" for name, type in program.params.items()]
    lines += [f"state({atom(name)}, {atom(type, aliases)})" for name, type in program.states.items()]
    parts = ["\n".join(lines)]
    parts += ["@template\n" + _function(g, aliases) for g in program.templates.values()]
    parts += ["@entry\n" + _function(g, aliases) for g in program.entries.values()]
    if program.round is not None:
        parts.append("@round\n" + _function(program.round, aliases))
    for tick in program.ticks:
        chunks = ", chunks=True" if tick.chunks else ""
        parts.append(f"@tick(every={tick.every}{chunks})\n" + _function(tick.graph, aliases))
    parts += ["@edit\n" + _function(g, aliases) for g in program.edits]
    return "\n\n".join(parts) + "\n"


def print_graph(graph: Graph) -> str:
    """The text of one graph: the parameters that it reads, then the graph."""
    read = {a for v in graph.values for a in v.args} | set(graph.outputs)
    params = {v.attr("name"): v.type for v in graph.values if v.op == "param" and v in read}
    lines = [f"param({atom(name)}, {atom(type)})" for name, type in sorted(params.items())]
    return "\n".join([*lines, _function(graph, {})]) + "\n"


def atom(value: Any, aliases: Mapping[Any, str] | None = None) -> str:
    """An attribute or a type as text."""
    if isinstance(value, KV | Array) and aliases and value in aliases:
        return aliases[value]
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, tuple):
        return f"({', '.join(atom(v, aliases) for v in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, Tensor):
        axes = ", ".join(map(str, value.axes))
        return f"{value.dtype}[{axes or '()'}]" + (f" in {value.encoding}" if value.encoding is not None else "")
    if isinstance(value, Env):
        return f"env.{value.name}"
    if isinstance(value, Mask):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        plain = [f"{k}={atom(v)}" for (k, v), f in zip(given, dataclasses.fields(value), strict=True) if v != f.default]
        return f"{type(value).__name__}({', '.join(plain)})"
    raise BadInput(f"{value!r} cannot be an attribute: expected a number, text, a tuple or a type of the IR")


def _aliases(program: Program) -> dict[Any, str]:
    """A short name for every distinct state type, in order of first appearance."""
    found: dict[Any, str] = {}
    types: list[Any] = [*program.states.values()]
    for graph in program.graphs().values():
        types += [v.type for v in graph.inputs]
        types += [a for v in graph.values for _, a in v.attrs]
    for type in types:
        if isinstance(type, KV | Array) and type not in found:
            kind = "KV" if isinstance(type, KV) else "Array"
            found[type] = f"{kind}{sum(a.startswith(kind) for a in found.values())}"
    return found


def _function(graph: Graph, aliases: Mapping[Any, str]) -> str:
    operands = ", ".join(f"{graph.names[v]}: {atom(v.type, aliases)}" for v in graph.inputs)
    items: dict[Value, list[Value]] = {}
    for v in graph.values:
        if v.op == "item":
            items.setdefault(v.args[0], []).append(v)
    lines = [f"def {graph.name}({operands}):"]
    for v in graph.values:
        if v.op in ("input", "param", "item"):
            continue
        targets = items[v] if isinstance(v.type, tuple) else [v]
        types = ", ".join(_brief(t.type) for t in targets)
        left = ", ".join(graph.names[t] for t in targets) + ("," if len(targets) == 1 and targets != [v] else "")
        args = [_ref(graph, a) for a in v.args] + [f"{k}={atom(a, aliases)}" for k, a in v.attrs]
        lines.append(f"    {left} = {v.op}({', '.join(args)})  # {types}")
    outputs = [_ref(graph, v) for v in graph.outputs]
    return "\n".join([*lines, f"    return {', '.join(outputs) if outputs else '()'}"])


def _ref(graph: Graph, value: Value) -> str:
    return f"param({atom(value.attr('name'))})" if value.op == "param" else graph.names[value]


def _brief(type: Any) -> str:
    return str(type) if isinstance(type, Tensor) else type.__class__.__name__
