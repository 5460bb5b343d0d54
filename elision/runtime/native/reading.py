"""Native code from an artefact: schedules are read strictly, so that what a table points to exists and is as large as it says.

What kernels do with plain numbers (a count of heads, a stride) is theirs: the manifest's digests say that these are the numbers
that the compiler wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NoReturn

from elision.errors import ArtefactError
from elision.ir import schedule as abi
from elision.ir.flatten import flat_entries
from elision.ir.program import Program, committed_states
from elision.ir.states import KV, Dense
from elision.ir.types import DTYPES, Tensor
from elision.ir.value import Graph, Value

_WORDS = {"tensor": 3, "weight": 1, "state": 1, "axis": 1, "int": 1, "float": 1}  # of an operand in a row
_MOST = 1 << 31  # bytes of a token in a buffer


def state_types(program: Program) -> dict[str, str]:
    """What native code relies on of the states, as text by name."""
    return {name: str(type) for name, type in program.states.items()}


def read_schedules(
    document: Any, program: Program, packings: Mapping[str, str], functions: Iterable[str]
) -> tuple[dict[str, abi.Schedule], dict[str, list[tuple[str, str]]], dict[str, list[tuple[str, str]]]]:
    """Schedules, host ops and signatures from ``kernels/cpu.json``. ``packings``: of the weights that there are; ``functions``:
    those of the object file. Raises ArtefactError for what cannot be a schedule of this program: memory that rows
    touch is checked, what numbers mean is not."""
    try:
        signatures = {name: _pairs(pairs) for name, pairs in document["signatures"].items()}
        hosts = {entry: _pairs(pairs) for entry, pairs in document["hosts"].items()}
        if document["states"] != state_types(program):
            _refuse("kernels for states of other types")
        if set(document) != {"signatures", "hosts", "schedules", "states"} or not set(signatures) <= set(functions):
            _refuse("kernels that the object does not have")
        schedules = {name: _schedule(name, fields) for name, fields in document["schedules"].items()}
    except (TypeError, KeyError, AttributeError, ValueError) as err:
        _refuse(f"fields of another kind ({err!r:.80})")
    graphs = flat_entries(program)
    graphs |= {t.graph.name: t.graph for t in program.ticks if t.graph.name in schedules}
    if set(schedules) - {"commit"} != set(graphs):
        _refuse(f"the entries {', '.join(schedules)}")
    for name, schedule in schedules.items():
        _Check(schedule, signatures, program, packings, graphs.get(name)).all()
    return schedules, hosts, signatures


def _refuse(what: str) -> NoReturn:
    raise ArtefactError(f"the schedule of the native code has {what}: the artefact is damaged, compile the model again")


def _pairs(value: Any) -> list[tuple[str, str]]:
    found = [(first, second) for first, second in value]
    if not all(isinstance(x, str) for pair in found for x in pair):
        raise TypeError("texts")
    return found


def _schedule(name: str, fields: dict[str, Any]) -> abi.Schedule:
    schedule = abi.Schedule(
        entry=fields["entry"],
        axes=fields["axes"],
        buffers=[abi.Buffer(**b) for b in fields["buffers"]],
        rows=[abi.Row(**{**r, "operands": _tuples(r["operands"])}) for r in fields["rows"]],
        inputs=fields["inputs"],
        outputs=list(_tuples(fields["outputs"])),
        states=fields["states"],
        caches={name: (index, axis) for name, (index, axis) in fields["caches"].items()},
        packings=fields["packings"],
    )
    if set(fields) != set(abi.Schedule.__dataclass_fields__) or schedule.entry != name:
        raise KeyError(name)
    return schedule


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _count(value: Any, stop: int, start: int = 0) -> bool:
    return type(value) is int and start <= value < stop


class _Check:
    """One schedule against the graph that it computes (None: the commit of a round)."""

    def __init__(
        self,
        schedule: abi.Schedule,
        signatures: Mapping[str, Sequence[tuple[str, str]]],
        program: Program,
        packings: Mapping[str, str],
        graph: Graph | None,
    ) -> None:
        self._schedule, self._signatures, self._program = schedule, signatures, program
        self._packings, self._graph = packings, graph

    def all(self) -> None:
        s = self._schedule
        axes = isinstance(s.axes, list) and 0 < len(s.axes) <= abi.MAX_AXES and all(isinstance(a, str) for a in s.axes)
        self._need(axes, f"the axes {s.axes!r:.60}")
        kv = {name for name, type in self._program.states.items() if isinstance(type, KV)}
        for cache, (index, axis) in s.caches.items():
            legal = isinstance(cache, str) and cache not in kv and _count(axis, len(s.axes), -1)
            legal = legal and self._graph is not None and _count(index, len(self._graph.values))
            self._need(legal and self._begins(index, axis), f"the cache {cache!r:.40}")
        kv |= {cache for cache, (_, axis) in s.caches.items() if axis >= 0}
        named = isinstance(s.states, list) and all(isinstance(name, str) for name in s.states)
        self._need(named and len(set(s.states)) == len(s.states), "states twice")
        closes = self._graph is not None or set(s.states) == set(committed_states(self._program))
        self._need(set(s.states) <= kv and closes, f"the states {s.states!r:.60}")
        known = isinstance(s.packings, dict) and all(self._packings.get(n) == how for n, how in s.packings.items())
        self._need(known, "weights that the artefact has not, or in another packing")
        self._buffers()
        for row in s.rows:
            self._row(row)
        graph = self._graph
        inputs = [v for v in graph.inputs if isinstance(v.type, Tensor)] if graph else []
        outputs = [v for v in graph.outputs if isinstance(v.type, Tensor)] if graph else []
        self._need(isinstance(s.inputs, list) and len(s.inputs) == len(inputs) and len(s.outputs) == len(outputs), "other inputs")
        for buffer, value in zip(s.inputs, inputs, strict=True):
            self._need(_count(buffer, len(s.buffers)), "an input without a buffer")
            b, size = s.buffers[buffer], _bytes(value)
            self._need(b.slot < 0 or b.width >= size and b.axis == 0, "an input without room")
        for place, value in zip(s.outputs, outputs, strict=True):
            self._view(place, value)

    def _begins(self, index: int, axis: int) -> bool:
        """Whether a cache of the call begins with that value, one that kernels can fill if it has an axis."""
        assert self._graph is not None
        value = self._graph.values[index]
        if value.op not in ("fresh", "empty") or not isinstance(value.type, KV):
            return False
        return axis < 0 or (len(value.type.segments) == 1 and isinstance(value.type.segments[0].slots, Dense))

    def _need(self, holds: bool, what: str) -> None:
        if not holds:
            _refuse(f"{what} in {self._schedule.entry}")

    def _buffers(self) -> None:
        slots: dict[int, tuple[int, int, bool]] = {}
        for b in self._schedule.buffers:
            legal = _count(b.axis, len(self._schedule.axes), -1) and _count(b.width, _MOST) and b.width % 64 == 0
            legal = legal and type(b.private) is bool and _count(b.slot, 1 << 20, -1)
            self._need(legal, f"the buffer {b}")
            form = (b.axis, b.width, b.private)
            self._need(b.slot < 0 or slots.setdefault(b.slot, form) == form, "one memory of two forms")

    def _row(self, row: abi.Row) -> None:
        legal = isinstance(row.kernel, str) and type(row.barrier) is bool and isinstance(row.label, str)
        self._need(legal and isinstance(row.operands, tuple), "a row of another form")
        if row.kernel:
            self._need(row.kernel in self._signatures and row.host == -1, f"the kernel {row.kernel!r:.40}")
            kinds = [kind for kind, _ in self._signatures[row.kernel]]
            given = [o[0] if isinstance(o, tuple) and o else None for o in row.operands]
            self._need(kinds == given and all(k in _WORDS for k in kinds), f"other operands of {row.kernel}")
            self._need(sum(_WORDS[k] for k in kinds) <= abi.WORDS - abi.OPERANDS, f"too many operands of {row.kernel}")
            for operand in row.operands:
                self._need(self._operand(operand), f"the operand {operand!r:.60} of {row.kernel}")
        else:
            self._host(row)

    def _operand(self, operand: tuple[Any, ...]) -> bool:
        s = self._schedule
        match operand:
            case ("tensor", str(name), 0, 0):
                return s.packings.get(name) == "plain"
            case ("tensor", buffer, offset, itemsize):
                if not _count(buffer, len(s.buffers)) or s.buffers[buffer].slot < 0:
                    return False
                width = s.buffers[buffer].width
                return itemsize in (1, 2, 4, 8) and _count(offset, max(width, 1)) and offset % itemsize == 0
            case ("weight", str(name)):
                return name in s.packings
            case ("state", str(name)):
                return name in s.states
            case ("axis", axis):
                return _count(axis, len(s.axes))
            case ("int", n):
                return _count(n, 1 << 63, -1 << 63)
            case ("float", x):
                return isinstance(x, float)
        return False

    def _host(self, row: abi.Row) -> None:
        graph = self._graph
        self._need(graph is not None and _count(row.host, len(graph.values)), "a row of the host without a value")
        assert graph is not None
        value = graph.values[row.host]
        parts = [value]
        if isinstance(value.type, tuple):
            parts = [v for v in graph.values if v.op == "item" and v.args[0] is value]
        match row.operands:
            case (("args", tuple(args)), ("results", tuple(results))):
                self._need(len(args) == len(value.args) and len(results) == len(parts), f"other operands of {value.op}")
                for place, described in zip((*args, *results), (*value.args, *parts), strict=True):
                    self._view(place, described)
            case _:
                self._need(False, f"other operands of {value.op}")

    def _view(self, place: Any, value: Value) -> None:
        """A value on the host: where it is, its type must be able to be."""
        s = self._schedule
        match place:
            case ("weight", name):
                legal = value.op == "param" and name == value.attr("name")
            case ("state", name):
                legal = value.is_state and (name in s.states or name in s.caches)
            case ("axis", axis):
                legal = isinstance(value.type, Tensor) and _count(axis, len(s.axes))
            case ("view", buffer, offset, tuple(strides), tuple(shape), str(dtype), axis) if isinstance(value.type, Tensor):
                legal = dtype == value.tensor.dtype and shape == value.tensor.features and _count(axis, len(s.axes))
                legal = legal and _count(buffer, len(s.buffers)) and s.buffers[buffer].axis == axis
                legal = legal and len(strides) == len(shape) and all(_count(n, _MOST) for n in (offset, *strides, *shape))
                if legal and s.buffers[buffer].slot >= 0:
                    last = offset + sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True))
                    legal = (last + 1) * DTYPES[dtype].itemsize <= s.buffers[buffer].width
            case _:
                legal = False
        self._need(legal, f"{place!r:.80} in the place of {value.op}")


def _bytes(value: Value) -> int:
    return prod(d for d in value.tensor.features if isinstance(d, int)) * DTYPES[value.tensor.dtype].itemsize
