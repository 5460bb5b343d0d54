"""A small typed emitter of MLIR text: values with Python's operators, loops and conditions as context managers.

Kernels are written with it as they would be on paper; text was faster to build and gives errors with line and column.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

PTR = "!llvm.ptr"
LANES = 8
VF, VI = f"vector<{LANES}xf32>", f"vector<{LANES}xi32>"
Num = int | float
_BYTES = {"f32": 4, "i32": 4, "i64": 8, "i8": 1, "i16": 2, "bf16": 2, "f16": 2, "f64": 8, PTR: 8}


def element(type: str) -> str:
    """The scalar type of a vector type (or of a scalar type: itself)."""
    return type[7:-1].split("x", 1)[1] if type.startswith("vector") else type


def vector(type: str, lanes: int = LANES) -> str:
    return f"vector<{lanes}x{type}>"


def lanes(type: str) -> int:
    return int(type[7:-1].split("x", 1)[0]) if type.startswith("vector") else 1


def like(type: str, scalar: str) -> str:
    """The type of the same number of lanes with another element."""
    return vector(scalar, lanes(type)) if type.startswith("vector") else scalar


@dataclass(frozen=True, eq=False)
class Val:
    """An SSA value. Arithmetic follows the type: floats, or signed integers; a Python number becomes a constant of it."""

    fn: Fn
    name: str
    type: str

    def _binary(self, other: Val | Num, op: str, flip: bool = False) -> Val:
        right = self.fn.value(other, self.type)
        a, b = (right, self) if flip else (self, right)
        kind = "f" if element(self.type) in ("f32", "f64", "f16", "bf16") else "i"
        return self.fn.emit(f"arith.{op}{kind} {a.name}, {b.name} : {self.type}", self.type)

    def __add__(self, other: Val | Num) -> Val:
        return self if isinstance(other, int) and other == 0 and self.type == "i64" else self._binary(other, "add")

    __radd__ = __add__

    def __sub__(self, other: Val | Num) -> Val:
        return self._binary(other, "sub")

    def __rsub__(self, other: Num) -> Val:
        return self._binary(other, "sub", flip=True)

    def __mul__(self, other: Val | Num) -> Val:
        return self if isinstance(other, int) and other == 1 and self.type == "i64" else self._binary(other, "mul")

    __rmul__ = __mul__

    def __truediv__(self, other: Val | Num) -> Val:
        return self._binary(other, "div")

    def __rtruediv__(self, other: Num) -> Val:
        return self._binary(other, "div", flip=True)

    def __floordiv__(self, other: Val | Num) -> Val:
        """Quotient of integers that are not negative."""
        return self._integer(other, "divui")

    def __mod__(self, other: Val | Num) -> Val:
        return self._integer(other, "remui")

    def __and__(self, other: Val | Num) -> Val:
        return self._integer(other, "andi")

    def __or__(self, other: Val | Num) -> Val:
        return self._integer(other, "ori")

    def __xor__(self, other: Val | Num) -> Val:
        return self._integer(other, "xori")

    def __lshift__(self, other: Val | Num) -> Val:
        return self._integer(other, "shli")

    def __rshift__(self, other: Val | Num) -> Val:
        """Shift right, filling with zeros."""
        return self._integer(other, "shrui")

    def _integer(self, other: Val | Num, op: str) -> Val:
        right = self.fn.value(other, self.type)
        return self.fn.emit(f"arith.{op} {self.name}, {right.name} : {self.type}", self.type)

    def __neg__(self) -> Val:
        if element(self.type).startswith("i"):
            return self.fn.value(0, self.type) - self
        return self.fn.emit(f"arith.negf {self.name} : {self.type}", self.type)


@dataclass
class Loop:
    """A loop being emitted: the induction variable, what it carries, and after `give` and its end the ``results``."""

    index: Val
    carried: list[Val]
    results: list[Val]
    fn: Fn

    def give(self, *values: Val) -> None:
        types = ", ".join(v.type for v in values)
        self.fn.line(f"scf.yield {', '.join(v.name for v in values)} : {types}")


class Fn:
    """One function being emitted."""

    def __init__(self, name: str, args: Sequence[tuple[str, str]], result: str = "") -> None:
        self.name, self.result = name, result
        self.args = [Val(self, f"%{n}", t) for n, t in args]
        self._lines: list[str] = []
        self._count, self._indent = 0, 1
        self._constants: list[dict[tuple[str, str], Val]] = [{}]

    # --- plumbing ---

    def line(self, text: str) -> None:
        self._lines.append("  " * self._indent + text)

    def fresh(self, type: str) -> Val:
        self._count += 1
        return Val(self, f"%v{self._count}", type)

    def emit(self, text: str, type: str) -> Val:
        found = self.fresh(type)
        self.line(f"{found.name} = {text}")
        return found

    def text(self, *, inline: bool = False) -> str:
        args = ", ".join(f"{a.name}: {a.type}" for a in self.args)
        result = f" -> {self.result}" if self.result else ""
        hint = "" if inline else ' attributes {passthrough = ["noinline"]}'
        return f"func.func @{self.name}({args}){result}{hint} {{\n" + "\n".join(self._lines) + "\n}\n"

    def returns(self, *values: Val) -> None:
        self.line("return" + "".join(f" {v.name} : {v.type}" for v in values))

    # --- constants, conversions ---

    def value(self, x: Val | Num, type: str) -> Val:
        return x if isinstance(x, Val) else self.const(x, type)

    def const(self, x: Num | Sequence[int], type: str) -> Val:
        """A constant; a scalar of a vector type fills all lanes. Kept per block, so that each is emitted once."""
        if isinstance(x, Sequence):
            text = "[" + ", ".join(map(str, x)) + "]"
        elif element(type) in ("f32", "f64", "bf16", "f16"):
            text = _float(float(x))
        else:
            text = str(int(x))
        text = f"dense<{text}> : {type}" if type.startswith("vector") else f"{text} : {type}"
        for scope in self._constants:
            if (text, type) in scope:
                return scope[text, type]
        found = self.emit(f"arith.constant {text}", type)
        self._constants[-1][text, type] = found
        return found

    def splat(self, x: Val, count: int = LANES) -> Val:
        type = vector(x.type, count)
        return self.emit(f"vector.broadcast {x.name} : {x.type} to {type}", type)

    def cast(self, x: Val, op: str, type: str) -> Val:
        """``arith.extsi``, ``arith.bitcast``, ... to another type."""
        return self.emit(f"{op} {x.name} : {x.type} to {type}", type)

    def address(self, x: Val) -> Val:
        return self.cast(x, "llvm.inttoptr", PTR)

    def i32(self, x: Val) -> Val:
        return self.cast(x, "arith.trunci", like(x.type, "i32"))

    # --- memory ---

    def at(self, base: Val, index: Val | int, unit: str = "i8") -> Val:
        """The address ``index`` elements of ``unit`` after ``base``."""
        if isinstance(index, int) and index == 0:
            return base
        if isinstance(index, int) and index * _BYTES.get(unit, 1) < 1 << 28:
            return self.emit(f"llvm.getelementptr inbounds {base.name}[{index}] : ({PTR}) -> {PTR}, {unit}", PTR)
        place = self.value(index, "i64").name
        return self.emit(f"llvm.getelementptr inbounds {base.name}[{place}] : ({PTR}, i64) -> {PTR}, {unit}", PTR)

    def load(self, base: Val, type: str, index: Val | int = 0, unit: str | None = None) -> Val:
        place = self.at(base, index, unit or element(type))
        return self.emit(f"llvm.load {place.name} {{alignment = {_BYTES[element(type)]} : i64}} : {PTR} -> {type}", type)

    def store(self, x: Val, base: Val, index: Val | int = 0, unit: str | None = None) -> None:
        place = self.at(base, index, unit or element(x.type))
        self.line(f"llvm.store {x.name}, {place.name} {{alignment = {_BYTES[element(x.type)]} : i64}} : {x.type}, {PTR}")

    def scatter(self, x: Val, base: Val, index: Val) -> None:
        """Store the lanes of a vector at as many places, ``index`` elements after an address; of equal ones the last counts."""
        count, pointers = lanes(x.type), f"vector<{lanes(x.type)}x{PTR}>"
        places = self.emit(
            f"llvm.getelementptr {base.name}[{index.name}] : ({PTR}, {index.type}) -> {pointers}, {element(x.type)}", pointers
        )
        mask = self.const(1, vector("i1", count))
        self.line(
            f"llvm.intr.masked.scatter {x.name}, {places.name}, {mask.name} {{alignment = {_BYTES[element(x.type)]} : i32}} : "
            f"{x.type}, {mask.type} into {pointers}"
        )

    def prefetch(self, place: Val) -> None:
        """Ask for the cache line at an address, to be read soon."""
        flags = [self.const(x, "i32").name for x in (0, 2, 1)]  # to read, into the second level, data
        args = f"{place.name}, {', '.join(flags)}"
        self.line(f'llvm.call_intrinsic "llvm.prefetch.p0"({args}) : ({PTR}, i32, i32, i32) -> ()')

    # --- control ---

    @contextmanager
    def loop(self, start: Val | int, stop: Val | int, step: Val | int = 1, carry: Sequence[Val] = ()) -> Iterator[Loop]:
        """A loop over i64; with ``carry``, the body must call `Loop.give` with the next values."""
        bounds = [self.value(x, "i64").name for x in (start, stop, step)]
        index, carried = self.fresh("i64"), [self.fresh(c.type) for c in carry]
        head = ""
        results: list[Val] = []
        if carry:
            self._count += 1
            name = f"%v{self._count}"
            head = f"{name}:{len(carry)} = "
            results = [Val(self, f"{name}#{i}", c.type) for i, c in enumerate(carry)]
        inits = ", ".join(f"{a.name} = {c.name}" for a, c in zip(carried, carry, strict=True))
        types = ", ".join(c.type for c in carry)
        carry_text = f" iter_args({inits}) -> ({types})" if carry else ""
        self.line(f"{head}scf.for {index.name} = {bounds[0]} to {bounds[1]} step {bounds[2]}{carry_text} : i64 {{")
        with self._block():
            yield Loop(index, carried, results, self)
        self.line("}")

    @contextmanager
    def when(self, condition: Val) -> Iterator[None]:
        self.line(f"scf.if {condition.name} {{")
        with self._block():
            yield
        self.line("}")

    @contextmanager
    def _block(self) -> Iterator[None]:
        self._indent += 1
        self._constants.append({})
        yield
        self._constants.pop()
        self._indent -= 1

    def call(self, name: str, *args: Val, result: str = "") -> Val | None:
        text = f"func.call @{name}({', '.join(a.name for a in args)}) : ({', '.join(a.type for a in args)}) -> "
        if result:
            return self.emit(text + result, result)
        self.line(text + "()")
        return None

    def intrinsic(self, name: str, *args: Val, result: str) -> Val:
        types = ", ".join(a.type for a in args)
        return self.emit(f'llvm.call_intrinsic "{name}"({", ".join(a.name for a in args)}) : ({types}) -> {result}', result)

    # --- arithmetic beyond Python's operators ---

    def fma(self, a: Val, b: Val, c: Val) -> Val:
        return self.emit(f"math.fma {a.name}, {b.name}, {c.name} : {a.type}", a.type)

    def math(self, name: str, x: Val) -> Val:
        return self.emit(f"math.{name} {x.name} : {x.type}", x.type)

    def minimum(self, a: Val, b: Val | Num) -> Val:
        return self._extreme(a, b, "min")

    def maximum(self, a: Val, b: Val | Num) -> Val:
        return self._extreme(a, b, "max")

    def _extreme(self, a: Val, b: Val | Num, which: str) -> Val:
        op = f"{which}imumf" if element(a.type).startswith(("f", "b")) else f"{which}si"
        return self.emit(f"arith.{op} {a.name}, {self.value(b, a.type).name} : {a.type}", a.type)

    def compare(self, a: Val, predicate: str, b: Val | Num) -> Val:
        """``eq ne slt sle sgt sge`` of integers, ``oeq une olt ole ogt oge`` of floats."""
        op = "cmpf" if element(a.type).startswith(("f", "b")) else "cmpi"
        right = self.value(b, a.type)
        return self.emit(f"arith.{op} {predicate}, {a.name}, {right.name} : {a.type}", like(a.type, "i1"))

    def select(self, condition: Val, a: Val, b: Val) -> Val:
        mask = "" if condition.type == "i1" else f"{condition.type}, "
        return self.emit(f"arith.select {condition.name}, {a.name}, {b.name} : {mask}{a.type}", a.type)

    def sum(self, x: Val) -> Val:
        return self._reduce("add", x)

    def top(self, x: Val) -> Val:
        return self._reduce("maximumf" if element(x.type) == "f32" else "maxsi", x)

    def _reduce(self, kind: str, x: Val) -> Val:
        scalar = element(x.type)
        return self.emit(f"vector.reduction <{kind}>, {x.name} : {x.type} into {scalar}", scalar)

    def extract(self, x: Val, lane: int) -> Val:
        return self.emit(f"vector.extract {x.name}[{lane}] : {element(x.type)} from {x.type}", element(x.type))


def _float(x: float) -> str:
    """A float constant, exact in float32."""
    if math.isinf(x) or math.isnan(x):
        return f"0x{struct.unpack('<I', struct.pack('<f', x))[0]:08X}"
    return f"{x:.9e}"
