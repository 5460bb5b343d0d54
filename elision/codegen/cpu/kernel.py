"""A kernel: one native function over a schedule row, whose signature says what the row must hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from elision.codegen.cpu.emit import PTR, Fn, Val
from elision.ir import schedule as abi


@dataclass
class Rows:
    """A tensor operand: token i begins ``i * stride`` elements after ``base``."""

    fn: Fn
    base: Val
    stride: Val

    def token(self, i: Val, unit: str = "f32") -> Val:
        return self.fn.at(self.base, i * self.stride, unit)


@dataclass
class View:
    """A tensor ``[tokens, outer, last]``: element (i, j) of a token begins ``j * stride`` elements after it."""

    rows: Rows
    stride: Val

    def place(self, token: Val, outer: Val | int) -> Val:
        return self.rows.fn.at(self.rows.token(token), outer * self.stride, "f32")


class Kernel:
    """Emits ``name(row, ctx, tid)``; every operand that is asked for takes the next words of the row."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fn = Fn(name, [("row", PTR), ("ctx", PTR), ("tid", "i64")])
        self.row, self.ctx, self.tid = self.fn.args
        self.signature: list[tuple[str, str]] = []
        self._word = abi.OPERANDS
        self.threads = self.fn.load(self.ctx, "i64", abi.THREADS)

    def _next(self, kind: str, name: str, words: int = 1) -> int:
        self.signature.append((kind, name))
        first, self._word = self._word, self._word + words
        assert self._word <= abi.WORDS, f"{self.name} has more operands than a row has words"
        return first

    def _load(self, word: int) -> Val:
        return self.fn.load(self.row, "i64", word)

    def tensor(self, name: str) -> Rows:
        word = self._next("tensor", name, 3)
        fn = self.fn
        base = fn.address(self._load(word) + self._load(word + 1) * self.tid)
        return Rows(fn, base, self._load(word + 2))

    def view(self, name: str) -> View:
        """A tensor with one outer feature axis, such as heads, besides the contiguous last one."""
        return View(self.tensor(name), self.integer(f"{name}.outer"))

    def parts(self, name: str) -> tuple[Val, Val, Val]:
        """A tensor of which every thread has a copy: the first copy, bytes to the next, elements from token to token."""
        word = self._next("tensor", name, 3)
        return self.fn.address(self._load(word)), self._load(word + 1), self._load(word + 2)

    def weight(self, name: str) -> Val:
        return self.fn.address(self._load(self._next("weight", name)))

    def state(self, name: str) -> State:
        index = self._load(self._next("state", name))
        table = self.fn.load(self.ctx, PTR, abi.STATES, "i64")
        return State(self.fn, self.fn.at(table, index * abi.STATE_WORDS, "i64"))

    def integer(self, name: str) -> Val:
        return self._load(self._next("int", name))

    def real(self, name: str) -> Val:
        fn = self.fn
        return fn.cast(fn.i32(self._load(self._next("float", name))), "arith.bitcast", "f32")

    def axis(self, name: str = "axis") -> Axis:
        return Axis(self.fn, self.fn.at(self.ctx, self._load(self._next("axis", name)), "i64"))

    def part(self, count: Val) -> tuple[Val, Val]:
        """This thread's share of ``count`` pieces."""
        return (count * self.tid) // self.threads, (count * (self.tid + 1)) // self.threads

    def share(self, count: Val) -> tuple[Val, Val]:
        """What of ``count`` tokens this thread does, as the row's operand ``share`` says (`elision.ir.schedule`)."""
        fn, how = self.fn, self.integer("share")
        low, high = self.part(count)
        split = fn.compare(how, "eq", abi.SPLIT)
        low, high = fn.select(split, low, fn.const(0, "i64")), fn.select(split, high, count)
        other = fn.compare(self.tid, "ne", self.threads - 1)
        idle = fn.emit(f"arith.andi {fn.compare(how, 'eq', abi.LAST).name}, {other.name} : i1", "i1")
        return low, fn.select(idle, low, high)

    @contextmanager
    def tokens(self, axis: Axis) -> Iterator[Val]:
        """A loop over this thread's share of an axis's tokens."""
        low, high = self.share(axis.count)
        with self.fn.loop(low, high) as loop:
            yield loop.index

    def text(self) -> str:
        self.fn.returns()
        return self.fn.text()


class Axis:
    """A token axis in the context."""

    def __init__(self, fn: Fn, base: Val) -> None:
        self._fn, self._base = fn, base
        self.count = fn.load(base, "i64", abi.AXIS["count"])

    def array(self, name: str) -> Val:
        """The address of one of its int64 arrays (see `elision.ir.schedule.AXIS`)."""
        return self._fn.load(self._base, PTR, abi.AXIS[name], "i64")


class State:
    """A cache's descriptor."""

    def __init__(self, fn: Fn, base: Val) -> None:
        self._fn, self._base = fn, base

    def address(self, name: str) -> Val:
        return self._fn.load(self._base, PTR, abi.STATE[name], "i64")

    def number(self, name: str) -> Val:
        return self._fn.load(self._base, "i64", abi.STATE[name])
