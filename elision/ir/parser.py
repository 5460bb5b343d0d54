"""Text back to programs: the exact inverse of `elision.ir.printer`.

The text is parsed with `ast` and walked; nothing in it is ever executed. Types are inferred again by the ops' rules, so
a text that says something impossible is refused. Every error names the line.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from elision.errors import BadInput
from elision.ir import states
from elision.ir.mask import Mask
from elision.ir.printer import VERSION
from elision.ir.program import Program, Tick
from elision.ir.types import DTYPES, Axis, Host, Tensor
from elision.ir.value import Builder, Env, Graph, Value
from elision.ir.weights import weight_encoding

MOST = 1 << 26  # characters; a program of 100 layers has about 10^5

_CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        states.Float, states.Int, states.Repaired, states.Dense, states.Ring, states.Budget, states.Paged, states.Scratch,
        states.Segment, states.Present, states.Gumbel, states.Scores, states.Summary, states.KV, states.Journal, states.Snapshot,
        states.Array, Host,
    )
}  # fmt: skip


def parse_program(text: str) -> Program:
    """The program that `print_program` printed. Raises BadInput naming the line and what was expected."""
    reader = _Reader()
    reader.module(text)
    if reader.program is None:
        raise BadInput("line 1: expected program(name=..., version=...)")
    return reader.program


def parse_graph(text: str, targets: Mapping[str, Graph] | None = None) -> Graph:
    """The graph that `print_graph` printed; ``targets`` are the graphs that it calls."""
    reader = _Reader(targets)
    reader.module(text)
    if len(reader.graphs) != 1 or reader.program is not None:
        raise BadInput(f"line 1: expected one graph, got {len(reader.graphs)}")
    return reader.graphs[0]


class _Reader:
    """Reads statements in order, into a program or, without one, into ``graphs``."""

    def __init__(self, targets: Mapping[str, Graph] | None = None) -> None:
        self.program: Program | None = None
        self.params: dict[str, Tensor] = {}
        self.graphs: list[Graph] = []
        self.aliases: dict[str, Any] = {}
        self.targets: dict[str, Graph] = dict(targets or {})

    def module(self, text: str) -> None:
        if len(text) > MOST:
            raise BadInput(f"line 1: a program of {len(text)} characters; expected at most {MOST}")
        try:
            tree = ast.parse(text)
        except SyntaxError as err:
            raise BadInput(f"line {err.lineno or 1}: {err.msg}") from err
        except (ValueError, RecursionError, MemoryError) as err:
            raise BadInput(f"line 1: the text cannot be parsed: {err}") from err
        for statement in tree.body:
            _at(statement, self._statement, statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name, args, kwargs = self._call(node.value)
            if name == "program" and not args and self.program is None and not self.graphs:
                self.program = _header(kwargs)
                self.params = self.program.params
                return
            if name == "param" and len(args) == 2 and not kwargs and isinstance(args[0], str) and isinstance(args[1], Tensor):
                self.params[args[0]] = args[1]
                return
            if name == "state" and len(args) == 2 and not kwargs and isinstance(args[0], str) and self.program is not None:
                _need(isinstance(args[1], states.KV | states.Array), f"{args[1]!r} is not a state type")
                self.program.states[args[0]] = args[1]
                return
        elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.aliases[node.targets[0].id] = self._atom(node.value)
            return
        elif isinstance(node, ast.FunctionDef):
            self._place(node, self._function(node))
            return
        raise BadInput("expected program(...), param(name, type), state(name, type), NAME = type, or a decorated def")

    def _place(self, node: ast.FunctionDef, graph: Graph) -> None:
        if self.program is None:
            self.graphs.append(graph)
            return
        _need(len(node.decorator_list) == 1, "expected @template, @entry, @round or @tick(every=n) before def")
        mark = node.decorator_list[0]
        kind = mark.id if isinstance(mark, ast.Name) else None
        if kind in ("template", "entry"):
            _need(graph.name not in self.targets, f"{graph.name} is defined twice")
            (self.program.templates if kind == "template" else self.program.entries)[graph.name] = graph
            self.targets[graph.name] = graph
        elif kind == "round":
            _need(self.program.round is None, "a second @round")
            self.program.round = graph
        elif kind == "edit":
            self.program.edits = (*self.program.edits, graph)
        elif isinstance(mark, ast.Call):
            name, args, kwargs = self._call(mark)
            every, chunks = kwargs.pop("every", None), kwargs.pop("chunks", False)
            given = name == "tick" and not args and not kwargs and _is_int(every) and isinstance(chunks, bool)
            _need(given, "expected @tick(every=n) or @tick(every=n, chunks=True)")
            self.program.ticks = (*self.program.ticks, Tick(every, graph, chunks))
        else:
            raise BadInput("expected @template, @entry, @round, @edit or @tick(every=n) before def")

    def _function(self, node: ast.FunctionDef) -> Graph:
        a = node.args
        _need(not (a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults), "operands are NAME: TYPE only")
        builder = Builder(node.name, self.targets)
        scope: dict[str, Value] = {}
        for operand in a.args:
            _need(operand.annotation is not None and operand.arg not in scope, f"operand {operand.arg} needs a type, once")
            type = self._atom(operand.annotation)  # type: ignore[arg-type]
            _need(isinstance(type, Tensor | states.KV | states.Array | Host), f"{operand.arg} has no type of the IR")
            scope[operand.arg] = builder.input(operand.arg, type)
        for statement in node.body[:-1]:
            _at(statement, self._line, statement, builder, scope)
        last = node.body[-1]
        if not isinstance(last, ast.Return) or last.value is None:
            raise BadInput(f"{node.name} does not end in return")
        results = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        return builder.build(*(_at(last, self._ref, r, builder, scope) for r in results))

    def _line(self, node: ast.stmt, builder: Builder, scope: dict[str, Value]) -> None:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.value, ast.Call):
            raise BadInput("expected NAME, .. = op(operands, attribute=value)")
        call = node.value
        _need(isinstance(call.func, ast.Name), "expected an op's name")
        args = [self._ref(a, builder, scope) for a in call.args]
        attrs = self._keywords(call)
        value = builder.add_with(call.func.id, args, attrs, None)  # type: ignore[attr-defined]
        target = node.targets[0]
        if isinstance(value.type, tuple):
            found = builder.items(value)
            names = target.elts if isinstance(target, ast.Tuple) else []
        else:
            found, names = [value], [target]
        _need(len(names) == len(found), f"{value.op} has {len(found)} results, not {len(names)}")
        for name, item in zip(names, found, strict=True):
            if not isinstance(name, ast.Name) or name.id in scope:
                raise BadInput(f"expected a new name for each result, got {ast.unparse(name)}")
            scope[name.id] = builder.named(item, name.id)

    def _ref(self, node: ast.expr, builder: Builder, scope: Mapping[str, Value]) -> Value:
        if isinstance(node, ast.Name):
            _need(node.id in scope, f"{node.id} is not defined before this line")
            return scope[node.id]
        if isinstance(node, ast.Call):
            name, args, kwargs = self._call(node)
            if name == "param" and len(args) == 1 and not kwargs and isinstance(args[0], str):
                _need(args[0] in self.params, f"there is no parameter {args[0]!r}")
                return builder.param(args[0], self.params[args[0]])
        raise BadInput(f"expected a value's name or param(name), got {ast.unparse(node)[:80]}")

    # --- attributes and types ---

    def _call(self, node: ast.Call) -> tuple[str, list[Any], dict[str, Any]]:
        _need(isinstance(node.func, ast.Name), f"{ast.unparse(node)[:80]} is not a call of a name")
        return node.func.id, [self._atom(a) for a in node.args], self._keywords(node)  # type: ignore[attr-defined]

    def _keywords(self, node: ast.Call) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for k in node.keywords:
            _need(k.arg is not None and k.arg not in found, "attributes are NAME=value, each once")
            found[str(k.arg)] = self._atom(k.value)
        return found

    def _atom(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self._atom(node.operand)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
        if isinstance(node, ast.Tuple):
            return tuple(self._atom(e) for e in node.elts)
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "env":
            return Env(node.attr)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in DTYPES:
            axes = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            return Tensor(tuple(_axis(a) for a in axes), node.value.id)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.In):
            type = self._atom(node.left)
            _need(isinstance(type, Tensor) and type.encoding is None, f"{ast.unparse(node.left)[:80]} is not a tensor type")
            return type.stored(weight_encoding(ast.unparse(node.comparators[0])))
        if isinstance(node, ast.Call):
            return self._object(node)
        raise BadInput(f"{ast.unparse(node)[:80]} is not an attribute or a type")

    def _name(self, name: str) -> Any:
        if name in ("inf", "nan"):
            return float(name)
        if name in ("causal", "full"):
            return Mask(name)
        _need(name in self.aliases, f"unknown name {name!r}")
        return self.aliases[name]

    def _object(self, node: ast.Call) -> Any:
        name, args, kwargs = self._call(node)
        if name in ("window", "chunk") and len(args) == 1 and not kwargs and _is_int(args[0]):
            return Mask(name, args[0])
        if name == "window" and len(args) == 2 and not kwargs and all(map(_is_int, args)):
            return Mask(name, *args)
        _need(name in _CLASSES and not args, f"unknown type {name!r}")
        cls = _CLASSES[name]
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in kwargs.items():
            _need(key in fields, f"{name} has no field {key!r}; its fields are {', '.join(fields)}")
            _need(_fits(value, str(fields[key].type)), f"{name}: {key}={value!r} is not of the type {fields[key].type}")
        missing = [k for k, f in fields.items() if f.default is dataclasses.MISSING and k not in kwargs]
        _need(not missing, f"{name} needs {', '.join(missing)}")
        return cls(**kwargs)


def _axis(node: ast.expr) -> int | Axis:
    """``t``, ``draft(d)``, a child ``t/last``, or a size."""
    if isinstance(node, ast.Constant) and _is_int(node.value):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.Name):
        return Axis(node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Name):
        parent = _axis(node.left)
        if isinstance(parent, Axis):
            return Axis(node.right.id, parent)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "draft" and len(node.args) == 1 and not node.keywords:
        inner = node.args[0]
        if isinstance(inner, ast.Name):
            return Axis(inner.id, draft=True)
    raise BadInput(f"{ast.unparse(node)[:80]} is not an axis: expected a size, a name, draft(name) or parent/name")


def _header(given: dict[str, Any]) -> Program:
    _need(
        set(given) == {"name", "version", "quality", "applied", "meta"},
        "program(...) needs name, version, quality, applied, meta",
    )
    _need(given["version"] == VERSION, f"IR version {given['version']!r}; this Elision reads {VERSION}")
    meta, applied = given["meta"], given["applied"]
    pairs = isinstance(meta, tuple) and all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in meta)
    _need(pairs, "meta is a tuple of (name, value) pairs")
    _need(isinstance(applied, tuple) and all(isinstance(p, str) for p in applied), "applied is a tuple of texts")
    _need(isinstance(given["name"], str) and isinstance(given["quality"], str), "name and quality are texts")
    return Program(given["name"], meta=dict(meta), applied=applied, quality=given["quality"])


def _fits(value: Any, hint: str) -> bool:
    """Whether a value is of a field's annotated type, for the few types that fields of the IR have."""
    kinds: dict[str, Any] = {
        "int": int, "float": (int, float), "str": str, "bool": bool, "Slots": states.Slots, "Encoding": states.Encoding,
        "Present": states.Present, "Undo": states.Undo, "Scores": states.Scores, "Summary": states.Summary, "Int": states.Int,
        "Gumbel": states.Gumbel,
    }  # fmt: skip
    if hint.endswith(" | None"):
        return value is None or _fits(value, hint.removesuffix(" | None"))
    if hint.startswith("tuple"):
        inner = states.Segment if "Segment" in hint else int
        return isinstance(value, tuple) and all(isinstance(v, inner) and not isinstance(v, bool) for v in value)
    return isinstance(value, kinds[hint]) and (hint == "bool" or not isinstance(value, bool))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise BadInput(message)


def _at(node: ast.stmt, read: Callable[..., Any], *args: Any) -> Any:
    """Read part of a statement; errors get its line."""
    try:
        return read(*args)
    except (BadInput, RecursionError) as err:
        text = str(err) if isinstance(err, BadInput) else "nested too deeply"
        raise BadInput(text if text.startswith("line ") else f"line {node.lineno}: {text}") from err
