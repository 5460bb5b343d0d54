"""Values and graphs: immutable, hash-consed, in order.

A graph is a list of values in execution order. Nothing is in place: state is a value too, and `append(S, k, v)` gives
the next one. Reads of a state come before its consumption in that order (the verifier checks it), so the interpreter and
the kernels may mutate the storage.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elision.ir.states import KV, Array
from elision.ir.types import Host, Tensor

Type = Tensor | KV | Array | Host
Types = Type | tuple[Type, ...]
Attr = Any  # None, bool, int, float, str, tuples of these, frozen dataclasses of the IR


@dataclass(frozen=True)
class Env:
    """An attribute of a template that each block supplies (a mask class, a scale): data of its row, not structure."""

    name: str


@dataclass(frozen=True, eq=False)
class Value:
    """The result of one op. Equal values of one graph are one object; compare with ``is``."""

    op: str
    args: tuple[Value, ...]
    attrs: tuple[tuple[str, Attr], ...]
    type: Types

    def attr(self, name: str, default: Attr = None) -> Attr:
        return dict(self.attrs).get(name, default)

    @property
    def tensor(self) -> Tensor:
        """The type, for values that are one tensor."""
        assert isinstance(self.type, Tensor), f"{self.op} is not a tensor"
        return self.type

    @property
    def is_state(self) -> bool:
        return isinstance(self.type, KV | Array)

    def __repr__(self) -> str:
        return f"<{self.op} {self.type}>"


@dataclass(frozen=True, eq=False)
class Graph:
    """``inputs`` (op ``input``), all ``values`` in execution order (inputs first), ``outputs``, and a name per value."""

    name: str
    inputs: tuple[Value, ...]
    values: tuple[Value, ...]
    outputs: tuple[Value, ...]
    names: Mapping[Value, str] = field(default_factory=dict)

    def key(self) -> tuple[Any, ...]:
        """The graph's structure with input names, without the names of inner values."""
        refs: dict[Value, Any] = {}
        rows: list[Any] = []
        for v in self.values:
            if v.op == "param":
                refs[v] = (v.attr("name"), v.type)
            elif v.op == "item":
                refs[v] = (refs[v.args[0]], v.attr("index"))
            else:
                refs[v] = len(rows)
                rows.append((v.op, tuple(refs[a] for a in v.args), v.attrs, v.type))
        return tuple(rows), tuple(refs[v] for v in self.outputs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.name == other.name and repr(self.key()) == repr(other.key())

    def __hash__(self) -> int:
        return hash((self.name, len(self.values)))

    def users(self) -> dict[Value, list[Value]]:
        """For each value, the values that take it as an argument, in order (once per argument)."""
        found: dict[Value, list[Value]] = {v: [] for v in self.values}
        for v in self.values:
            for a in v.args:
                found[a].append(v)
        return found

    def input(self, name: str) -> Value:
        return next(v for v in self.inputs if self.names[v] == name)

    def calls(self) -> list[Value]:
        """The block calls in order of the stream."""
        return [v for v in self.values if v.op == "call"]


class Builder:
    """Builds one graph. `add` infers the type by the op's rule and returns an equal existing value if there is one."""

    def __init__(self, name: str, targets: Mapping[str, Graph] | None = None) -> None:
        self.name, self.targets = name, targets or {}
        self._table: dict[Any, Value] = {}
        self._inputs: list[Value] = []
        self._order: list[Value] = []
        self._hints: dict[Value, str] = {}

    def input(self, name: str, type: Type) -> Value:
        value = self._intern("input", (), (("name", name),), type)
        self._inputs.append(value)
        self._hints[value] = name
        return value

    def param(self, name: str, type: Tensor) -> Value:
        return self._intern("param", (), (("name", name), ("type", type)), type)

    def add(self, op: str, *args: Value, name: str | None = None, **attrs: Attr) -> Any:
        """One value, or a tuple of them for an op with several results. ``name`` is a hint for the printer."""
        found = self.add_with(op, args, attrs, None, name)
        return tuple(self.items(found)) if isinstance(found.type, tuple) else found

    def add_with(
        self, op: str, args: Iterable[Value], attrs: Mapping[str, Attr], type: Types | None, name: str | None = None
    ) -> Value:
        """As `add`, with the type given (or inferred if None) and results not unpacked."""
        from elision.ir.op import infer_type  # ops are written in terms of values, hence not at import

        args = tuple(args)
        type = infer_type(op, args, attrs, self.targets) if type is None else type
        value = self._intern(op, args, tuple(sorted(attrs.items())), type)
        if isinstance(value.type, tuple):
            self.items(value)
        elif name is not None:
            self._hints.setdefault(value, name)
        return value

    def items(self, value: Value) -> list[Value]:
        """The results of a value with several."""
        assert isinstance(value.type, tuple)
        return [self._intern("item", (value,), (("index", i),), t) for i, t in enumerate(value.type)]

    def named(self, value: Value, name: str) -> Value:
        self._hints.setdefault(value, name)
        return value

    def build(self, *outputs: Value) -> Graph:
        """The finished graph; every value gets a unique printable name."""
        names: dict[Value, str] = {}
        taken = {self._hints[v] for v in self._inputs}
        for value in self._order:
            if value.op == "input":
                names[value] = self._hints[value]
            elif value.op != "param" and not isinstance(value.type, tuple):
                names[value] = _unique(self._hints.get(value, value.op), taken)
        inputs = tuple(self._inputs)
        rest = tuple(v for v in self._order if v.op != "input")
        return Graph(self.name, inputs, inputs + rest, outputs, names)

    def _intern(self, op: str, args: tuple[Value, ...], attrs: tuple[tuple[str, Attr], ...], type: Types) -> Value:
        key = (op, tuple(map(id, args)), repr(attrs))  # repr tells 1 from 1.0 and True, and nan equals nan
        found = self._table.get(key)
        if found is None:
            found = self._table[key] = Value(op, args, attrs, type)
            self._order.append(found)
        return found


def _unique(hint: str, taken: set[str]) -> str:
    """``hint`` as an identifier, with the smallest number that makes it new."""
    base = "".join(c if c.isalnum() else "_" for c in hint)
    base = base if base[:1].isalpha() and not keyword.iskeyword(base) else f"v_{base}"
    name, count = base, 1
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    taken.add(name)
    return name


Rule = Callable[[Builder, Value, tuple[Value, ...]], Value | tuple[Value, ...] | None]


def rewrite(
    graph: Graph,
    rule: Rule,
    targets: Mapping[str, Graph] | None = None,
    *,
    more: Callable[[], Iterable[Value]] = tuple,
    keep: bool = False,
) -> Graph:
    """Rebuild a graph, asking ``rule(builder, value, new_args)`` for each value in order.

    The rule returns what stands for the value (a tuple for an op with several results), or None for the value itself with
    its new arguments. ``targets`` are the graphs that calls refer to; ``more()`` gives further outputs that the
    rule made. Values that the outputs do not need are left out unless ``keep``.
    """
    builder = Builder(graph.name, targets)
    new: dict[Value, Value] = {}
    results: dict[Value, tuple[Value, ...]] = {}
    needed = set(graph.values) if keep else live(graph)
    for value in graph.values:
        if value.op != "input" and value not in needed:
            continue
        hint = graph.names.get(value)
        if value.op == "item":
            new[value] = results[value.args[0]][value.attr("index")]
            if hint and new[value].op == "item":
                builder.named(new[value], hint)
            continue
        args = tuple(new[a] for a in value.args)
        found = rule(builder, value, args)
        if found is None:
            found = copy_value(builder, value, args, hint)
        if isinstance(found, tuple):
            results[value] = found
        elif isinstance(found.type, tuple):
            results[value] = tuple(builder.items(found))
        else:
            new[value] = found
    return builder.build(*(new[v] for v in graph.outputs), *more())


def copy_value(builder: Builder, value: Value, args: tuple[Value, ...], name: str | None = None) -> Value:
    """The same op and attributes on other arguments; the type is inferred again."""
    if value.op == "input":
        assert not isinstance(value.type, tuple)
        return builder.input(value.attr("name"), value.type)
    if value.op == "param":
        return builder.param(value.attr("name"), value.tensor)
    return builder.add_with(value.op, args, dict(value.attrs), None, name)


def live(graph: Graph) -> set[Value]:
    """The values that the outputs need, and the inputs."""
    found: set[Value] = set(graph.inputs)
    stack = list(graph.outputs)
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack.extend(value.args)
    return found

