"""From regions to the rows of a schedule: buffers, who computes what, and where threads wait for one another.

With few tokens (``step``) everything but products is computed by every thread for itself, into memory of its own, because that
is cheaper than waiting; with many (``prefill``) threads share the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from elision.codegen.refusal import NotNative, floats, need
from elision.codegen.regions import Products, Region
from elision.ir import schedule as abi
from elision.ir.ops.program import origin
from elision.ir.states import KV
from elision.ir.types import DTYPES, Axis, Tensor
from elision.ir.value import Graph, Value


@dataclass(frozen=True)
class Ref:
    """Where a value lies: elements from ``offset`` on in each token of a buffer, with the strides of its features."""

    buffer: int
    offset: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        return self.strides == contiguous(self.shape)


@dataclass
class _Draft:
    """A row before buffers have memory: what it reads and writes, to find where to wait."""

    kernel: str
    operands: list[tuple[Any, ...]]
    reads: set[Any] = field(default_factory=set)
    writes: set[Any] = field(default_factory=set)
    host: int = -1
    label: str = ""


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


class Planner:
    """Collects the rows of one entry. Emitters (`elision.codegen.cpu.emitters`) call it."""

    def __init__(self, graph: Graph, many: bool, signature: Callable[[str], list[tuple[str, str]]]) -> None:
        self.graph, self.many, self._signature = graph, many, signature
        self.share = abi.SPLIT if many else abi.ALL
        self.schedule = abi.Schedule(graph.name, [])
        self.refs: dict[Value, Ref] = {}
        self.tables: dict[Any, Ref] = {}  # rotations that are already there
        self._states: dict[Value, str] = {}
        self._caches: dict[str, tuple[Value, int]] = {}  # of the call: a value that begins it, and after which region it is free
        self._last: dict[Value, int] = {}  # by where a state begins: the last region that touches it
        self._here = 0
        self._axes: dict[Axis, int] = {}
        self._drafts: list[_Draft] = []
        self._buffers: list[tuple[int, int, bool, bool]] = []  # axis, bytes per token, private, read across
        self.hosts: list[tuple[str, str]] = []  # what the host runs, and why

    # --- values ---

    def axis(self, value: Value) -> int:
        axis = value.tensor.tokens
        assert axis is not None
        return self._axes.setdefault(axis, len(self._axes))

    def drafted(self, axis: int) -> bool:
        """Whether the tokens of an axis are drafts."""
        return next(a for a, i in self._axes.items() if i == axis).drafted

    def ref(self, value: Value) -> Ref:
        """Where a value is. Raises NotNative for a weight."""
        if value not in self.refs:
            raise NotNative(f"{value.op} is no activation")
        return self.refs[value]

    def new(self, value: Value, *, private: bool | None = None) -> Ref:
        """A new buffer for a value; ``private`` by default where every thread computes it for itself."""
        shape = tuple(d for d in value.tensor.features if isinstance(d, int))
        found = self.buffer(self.axis(value), prod(shape) * DTYPES[value.tensor.dtype].itemsize, private)
        self.refs[value] = Ref(found, 0, contiguous(shape), shape)
        return self.refs[value]

    def buffer(self, axis: int, bytes: int, private: bool | None = None, across: bool = False) -> int:
        """A new buffer. ``across``: threads read each other's copies, so that its memory is waited for like a shared one."""
        private = not self.many if private is None else private
        self._buffers.append((axis, -(-bytes // 64) * 64, private, across))
        return len(self._buffers) - 1

    def packing(self, weight: Value, packing: str) -> tuple[Any, ...]:
        """The operand of a weight in a packing. Raises NotNative if it is needed in two, or is plain and not of float32, as which
        kernels read it."""
        need(weight.op == "param", f"{weight.op} in the place of a weight")
        if packing == "plain":
            floats(weight)
        name = weight.attr("name")
        known = self.schedule.packings.setdefault(name, packing)
        if known != packing:
            raise NotNative(f"{name} is needed as {known} and as {packing}")
        return ("weight", name)

    def state(self, value: Value) -> str:
        """The name of the state that a state value is a version of."""
        return self._states[value]

    def cache(self, value: Value, native: bool = True) -> str:
        """The name of a cache that lives for this call only, begun by ``fresh`` or ``empty``. Kernels' caches of one type share
        memory while they are never alive at the same time; one that the host fills (not ``native``) is its own."""
        for name, (first, until) in self._caches.items():
            alike = first.type == value.type
            if native and alike and until < self._here and self.schedule.caches[name][1] >= 0:
                break
        else:
            axis = self.axis(value.args[0]) if native else -1
            name, first = f"call_{len(self._caches)}", value
            self.schedule.caches[name] = (self.graph.values.index(value), axis)
        self._caches[name] = first, self._last.get(value, self._here)
        self._states[value] = name
        return name

    # --- operands ---

    def tensor(self, ref: Ref, itemsize: int = 4) -> tuple[Any, ...]:
        return ("tensor", ref.buffer, ref.offset * itemsize, itemsize)

    def view(self, ref: Ref) -> tuple[list[tuple[Any, ...]], int, int]:
        """The operands of a view, its outer count and its width. Raises NotNative if it has no such form."""
        if not ref.shape:
            return [self.tensor(ref), ("int", 0)], 1, 1
        if ref.contiguous:
            outer, width = prod(ref.shape[:-1]), ref.shape[-1]
            return [self.tensor(ref), ("int", width)], outer, width
        if ref.strides[-1] != 1 and ref.shape[-1] != 1:
            raise NotNative("channels that are not side by side")
        sizes = [(n, s) for n, s in zip(ref.shape[:-1], ref.strides[:-1], strict=True) if n != 1]
        for (_, outer), (n, inner) in zip(sizes, sizes[1:], strict=False):
            if outer != n * inner:
                raise NotNative("three feature axes with gaps")
        return [self.tensor(ref), ("int", sizes[-1][1] if sizes else 0)], prod(ref.shape[:-1]), ref.shape[-1]

    # --- rows ---

    def row(self, kernel: str, *operands: tuple[Any, ...], reads: Sequence[Any] = (), writes: Sequence[Any] = ()) -> None:
        """Add a row. ``reads``, ``writes``: the buffers and states that it touches, beyond what `Ref` operands say."""
        kinds = [kind for kind, _ in self._signature(kernel)]
        assert [o[0] for o in operands] == kinds, f"{kernel} takes {kinds}, not {[o[0] for o in operands]}"
        touched_out = {b for b in writes}
        found = {o[1] for o in operands if o[0] == "tensor" and isinstance(o[1], int)} - touched_out
        self._drafts.append(_Draft(kernel, list(operands), found | set(reads), touched_out))

    def launch(self, kernel: str, operands: list[tuple[Any, ...]], reads: Sequence[Any], writes: Sequence[Any]) -> None:
        """Add a launch (`elision.ir.launch`), whose operands are as many as its kernel has parameters."""
        found = {o[1] for o in operands if o[0] == "tensor"} - {*writes}
        self._drafts.append(_Draft(kernel, operands, found | {*reads}, {*writes}))

    def axes(self, value: Value) -> int:
        """A row by which the runtime makes the axis of a value, before the first launch: ``("made", axis, axis before)``."""
        made, parent = self.axis(value), self.axis(value.args[0])
        self._drafts.append(_Draft("", [("made", made, parent)], host=self.graph.values.index(value)))
        return made

    def host(self, value: Value, index: int, why: str) -> None:
        """The host runs the op on the same memory. Its operands are described in full, its results are shared by the threads."""
        self.hosts.append((value.op, why))
        args = [self._described(a) for a in value.args]
        parts = [value]
        if isinstance(value.type, tuple):
            parts = [v for v in self.graph.values if v.op == "item" and v.args[0] is value]
        reads = {self.refs[a].buffer for a in value.args if a in self.refs}
        writes: set[Any] = set()
        states = [a for a in value.args if a.is_state]
        for part in parts:
            if part.is_state:
                self._states[part] = self._states[states[0]] if states else self.cache(part, native=False)
            else:
                writes.add(self.new(part, private=False).buffer)
        names = {self._states[s] for s in (*states, *(p for p in parts if p.is_state))}
        operands = [("args", args), ("results", [self._described(p) for p in parts])]
        self._drafts.append(_Draft("", operands, reads | names, writes | names, index))

    def _described(self, value: Value) -> tuple[Any, ...]:
        """Where the host finds a value: ``("view", buffer, offset, strides, shape, dtype, axis)``, weight, state, axis."""
        if value.op == "param":
            return ("weight", value.attr("name"))
        if value.is_state:
            return ("state", self._states[value])
        if value not in self.refs:  # not computed yet: an op that only looks at its positions
            return ("axis", self.axis(value))
        ref = self.refs[value]
        return ("view", ref.buffer, ref.offset, ref.strides, ref.shape, value.tensor.dtype, self.axis(value))

    def follow(self, value: Value, before: Value) -> None:
        """A state value is the next version of another."""
        self._states[value] = self._states[before]

    def kernels(self) -> list[tuple[str, list[tuple[Any, ...]]]]:
        """Kernel and operands of the rows so far."""
        return [(d.kernel, d.operands) for d in self._drafts]

    # --- the whole ---

    def plan(
        self, found: Sequence[Region], emit: Callable[[Planner, Region], None], end: Callable[[Planner], None] = lambda plan: None
    ) -> abi.Schedule:
        """The schedule: ``emit`` adds the rows of each region, or raises NotNative; ``end`` adds the last rows."""
        index = {v: i for i, v in enumerate(self.graph.values)}
        for value in self.graph.inputs:
            if isinstance(value.type, Tensor):
                self.new(value, private=False)
                self.schedule.inputs.append(self.refs[value].buffer)
            elif isinstance(value.type, KV):
                self._states[value] = self.graph.names[value]
        self._last = _last_uses(found)
        for self._here, region in enumerate(found):
            value = region.result if isinstance(region, Products) else region
            if value.op == "item":  # a part of a value that has been placed
                continue
            before = len(self._drafts)
            try:
                emit(self, region)
            except NotNative as err:
                del self._drafts[before:]
                if isinstance(region, Products):
                    for a in value.args:
                        if a.op == "linear" and a not in self.refs:
                            self.host(a, index[a], str(err))
                self.host(value, index[value], str(err))
        end(self)
        self.schedule.outputs = [self._described(v) for v in self.graph.outputs if v in self.refs]
        kept = [n for n in dict.fromkeys(self._states.values()) if self.schedule.caches.get(n, (0, 0))[1] >= 0]
        self.schedule.states = kept
        self.schedule.axes = [a.name for a in self._axes]
        self._memory()
        return self.schedule

    def _memory(self) -> None:
        """Give buffers memory that is shared over time, and put barriers between rows."""
        last: dict[int, int] = {}
        for i, d in enumerate(self._drafts):
            last.update({b: i for b in d.reads | d.writes if isinstance(b, int)})
        keep = {*self.schedule.inputs, *(o[1] for o in self.schedule.outputs)}
        slots: list[tuple[int, int, bool, bool]] = []  # axis, bytes, private, across
        free: list[int] = []
        place: dict[int, int] = {}

        def assign(buffer: int) -> None:
            axis, bytes, *kind = self._buffers[buffer]
            fits = [s for s in free if slots[s][0] == axis and [*slots[s][2:]] == kind]
            best = min(fits, key=lambda s: (abs(slots[s][1] - bytes), s), default=None)
            if best is None:
                slots.append(self._buffers[buffer])
                best = len(slots) - 1
            else:
                free.remove(best)
                slots[best] = (axis, max(slots[best][1], bytes), *slots[best][2:])
            place[buffer] = best

        for b in sorted(keep):
            assign(b)
        for i, d in enumerate(self._drafts):
            for b in sorted(x for x in d.writes if isinstance(x, int) and x not in place):
                assign(b)
            for b in {x for x in d.reads | d.writes if isinstance(x, int)} - keep:
                if last[b] == i:
                    free.append(place[b])
        self.schedule.buffers = [
            abi.Buffer(axis, slots[place[b]][1], private, place[b]) if b in place else abi.Buffer(axis, 0, private, -1)
            for b, (axis, _, private, _) in enumerate(self._buffers)
        ]
        self._barriers(place)

    def _barriers(self, place: dict[int, int]) -> None:
        read: set[Any] = set()
        written: set[Any] = set()
        rows: list[abi.Row] = []

        def shared(touched: set[Any]) -> set[Any]:
            """What other threads see of it: states, and buffers that are not private or read across."""
            own = {b for b in touched if isinstance(b, int) and self._buffers[b][2] and not self._buffers[b][3]}
            return {place[b] if isinstance(b, int) else b for b in touched - own}

        for d in self._drafts:
            reads, writes = shared(d.reads), shared(d.writes)
            if d.host >= 0 or reads & written or writes & (read | written):
                if rows and rows[-1].host < 0:
                    rows[-1] = abi.Row(rows[-1].kernel, rows[-1].operands, True, -1, rows[-1].label)
                read, written = set(), set()
            if d.host < 0:
                read, written = read | reads, written | writes
            rows.append(abi.Row(d.kernel, tuple(d.operands), False, d.host, d.label))
        self.schedule.rows = rows


def _last_uses(found: Sequence[Region]) -> dict[Value, int]:
    """By where a state begins: the last region that touches it or what it becomes."""
    last: dict[Value, int] = {}
    for i, region in enumerate(found):
        for value in () if isinstance(region, Products) else (region, *region.args):
            if value.is_state:
                last[origin(value)] = i
    return last
