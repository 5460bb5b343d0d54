"""Caches whose heads are divided: some keep all entries, the others have a cache of their own that keeps fewer."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from elision.ir.mask import Mask
from elision.ir.ops.program import origin
from elision.ir.program import Program, state_inputs
from elision.ir.states import KV
from elision.ir.value import Builder, Graph, Value, rewrite

#: Of each cache of a call the key heads that keep everything; None for one that stays whole.
Heads = tuple[tuple[int, ...] | None, ...]


def other(name: str) -> str:
    """The name of the cache of the heads that keep less."""
    return f"{name}_few"


@dataclass
class Split:
    """Divides the caches named in ``full`` (the key heads of each that keep everything: some, not all of them) in `prefill` and
    `step`. The other heads get a cache of the type that ``few`` makes of the old one, and attend by ``mask``."""

    program: Program
    full: Mapping[str, tuple[int, ...]]
    few: Callable[[KV], KV]
    mask: Mask
    made: dict[str, Graph] = field(default_factory=dict)
    names: dict[tuple[str, Heads], str] = field(default_factory=dict)

    def apply(self) -> None:
        program = self.program
        types = {n: self._types(t, self.full[n]) for n, t in program.states.items() if n in self.full and isinstance(t, KV)}
        for entry in ("prefill", "step"):
            program.entries[entry] = self._entry(program.entries[entry])
            program.templates.update(self.made)
        program.states |= {n: t for n, (t, _) in types.items()} | {other(n): t for n, (_, t) in types.items()}
        program.drop_unused()

    def _types(self, type: KV, full: tuple[int, ...]) -> tuple[KV, KV]:
        return replace(type, heads=len(full)), replace(self.few(type), heads=type.heads - len(full))

    def _entry(self, graph: Graph) -> Graph:
        names = {v: n for n, v in state_inputs(graph).items() if n in self.full}
        both = {v: self._types(v.type, self.full[n]) for v, n in names.items() if isinstance(v.type, KV)}
        seconds: dict[Value, Value] = {}  # of each divided cache the newest value of the new one

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | tuple[Value, ...] | None:
            if v in names:
                return b.input(names[v], both[v][0])
            if v.op == "input":
                return None
            if not seconds:  # all inputs are there
                seconds.update({old: b.input(other(n), both[old][1]) for old, n in names.items()})
            caches = [origin(a) for a in v.args if isinstance(a.type, KV)]
            divided = [c for c in caches if c in names]
            if v.op != "call" or not divided:
                return None
            heads = tuple(self.full[names[c]] if c in names else None for c in caches)
            attrs = {**dict(v.attrs), "target": self._template(v.attr("target"), heads)}
            results = b.items(b.add_with("call", (*args, *(seconds[c] for c in divided)), attrs, None))
            seconds.update(zip(divided, results[-len(divided) :], strict=True))
            return tuple(results[: -len(divided)])

        targets = ChainMap(self.made, dict(self.program.targets))
        return rewrite(graph, rule, targets, more=lambda: [seconds[v] for v in names])

    def _template(self, name: str, heads: Heads) -> str:
        if (name, heads) not in self.names:
            taken = {**self.program.targets, **self.made}
            new = next(n for i in range(1, len(taken) + 2) if (n := f"{name}_split{i}") not in taken)
            self.made[new] = replace(self._divided(self.program.templates[name], heads), name=new)
            self.names[name, heads] = new
        return self.names[name, heads]

    def _divided(self, graph: Graph, heads: Heads) -> Graph:
        """The template with a second cache, after all its operands, for each one whose heads are named."""
        caches = [v for v in graph.inputs if isinstance(v.type, KV)]
        full = {v: some for v, some in zip(caches, heads, strict=True) if some is not None}
        both = {v: self._types(v.type, some) for v, some in full.items() if isinstance(v.type, KV)}
        seconds: dict[Value, Value] = {}

        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v in full:
                return b.input(v.attr("name"), both[v][0])
            if v.op == "input":
                return None
            if not seconds:
                seconds.update({old: b.input(other(old.attr("name")), both[old][1]) for old in full})
            begin = origin(v.args[0 if v.op == "append" else 1]) if v.op in ("append", "attend") else None
            if begin is None or begin not in full:
                return None
            count = both[begin][0].heads + both[begin][1].heads
            parts = full[begin], tuple(h for h in range(count) if h not in full[begin])
            if v.op == "append":
                cache, *rows = args
                first, second = (
                    b.add("append", c, *(take(b, x, some) for x in rows), name="kv")
                    for c, some in zip((cache, seconds[begin]), parts, strict=True)
                )
                seconds[begin] = second
                return first  # type: ignore[no-any-return]
            q, cache = args
            found = []
            wide = [_queries(q, count, some) for some in parts]
            for c, some, more in zip((cache, seconds[begin]), wide, ({}, {"mask": self.mask}), strict=True):
                found.append(b.add_with("attend", (take(b, q, some), c), {**dict(v.attrs), **more}, None, "o"))
            return join(b, found, wide)

        return rewrite(graph, rule, more=lambda: [seconds[v] for v in full])


def _queries(q: Value, count: int, heads: Sequence[int]) -> tuple[int, ...]:
    """The query heads of some of ``count`` key heads."""
    size = q.tensor.axes[1]
    assert isinstance(size, int)
    return tuple(h * (size // count) + g for h in heads for g in range(size // count))


def take(b: Builder, x: Value, heads: Sequence[int]) -> Value:
    """``x [t, heads, width]`` at these heads, ascending."""
    size, width = x.tensor.axes[1:]
    assert isinstance(size, int) and isinstance(width, int)
    flat = b.add("view", x, shape=(size * width,))
    parts = [b.add("slice", flat, start=first * width, stop=(first + n) * width) for _, first, n in _runs(heads)]
    return b.add("view", parts[0] if len(parts) == 1 else b.add("concat", *parts), shape=(len(heads), width))  # type: ignore[no-any-return]


def join(b: Builder, found: Sequence[Value], heads: Sequence[Sequence[int]]) -> Value:
    """``[t, heads, width]`` of parts with these heads, in the heads' order."""
    width = found[0].tensor.axes[2]
    assert isinstance(width, int)
    flat = [b.add("view", x, shape=(len(some) * width,)) for x, some in zip(found, heads, strict=True)]
    pieces = sorted((first, i, at, n) for i, some in enumerate(heads) for at, first, n in _runs(some))
    parts = [b.add("slice", flat[i], start=at * width, stop=(at + n) * width) for _, i, at, n in pieces]
    return b.add("view", b.add("concat", *parts), shape=(sum(map(len, heads)), width))  # type: ignore[no-any-return]


def _runs(heads: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of consecutive numbers: the place of the first, the first, how many."""
    found: list[tuple[int, int, int]] = []
    for i, h in enumerate(heads):
        if found and h == found[-1][1] + found[-1][2]:
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((i, h, 1))
    return found
