"""Rows of a cache in registers: how the codes of a key or of a value are read and written (`elision.ir.encoding` is the meaning).

A form is a dtype of floats, or ``i8``: signed bytes with one float32 scale for the row, which multiplies what is computed with
them; or `elision.codegen.cpu.grouped.Grouped`: codes that become floats as they are read; or `elision.codegen.cpu.mended.Mended`:
codes of which a block at a time becomes floats.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from elision.codegen.cpu.emit import LANES, VF, Fn, Val, like, vector
from elision.codegen.cpu.grouped import Grouped, grouped
from elision.codegen.cpu.mended import Mended, mended
from elision.codegen.cpu.rows import channels
from elision.codegen.refusal import NotNative
from elision.ir.states import Encoding, Float, Int, Repaired

Form = str | Grouped | Mended
BYTES: dict[Form, int] = {"f32": 4, "bf16": 2, "f16": 2, "i8": 1}
_LIMIT = 127.0  # of a code


def form(encoding: Encoding, dim: int, keys: bool = True) -> Form:
    """The form of rows of ``dim`` channels. Raises NotNative if kernels have none for this encoding."""
    if encoding == Int(8, "channel", dim):
        return "i8"
    if isinstance(encoding, Float) and encoding.dtype in BYTES:
        return encoding.dtype
    if isinstance(encoding, Float):
        raise NotNative(f"a cache of {encoding.dtype}")
    if isinstance(encoding, Repaired):
        return mended(encoding, dim, keys)
    return grouped(encoding, dim, keys)


def row_bytes(form: Form, dim: int) -> int:
    """Bytes of the codes of a row."""
    return dim * BYTES[form] if isinstance(form, str) else form.width(dim)


def scaled(form: Form) -> bool:
    """Whether rows have a scale that what is computed with their codes is multiplied by."""
    return form == "i8"


def unit(form: Form) -> str:
    """The type of a code in memory, or of a byte of codes."""
    return "i8" if not isinstance(form, str) else {"f32": "f32", "bf16": "i16", "f16": "f16", "i8": "i8"}[form]


def load(fn: Fn, base: Val, index: Val | int, form: str, lanes: int) -> Val:
    """A vector of codes as float32, without their scale."""
    codes = fn.load(base, vector(unit(form), lanes), index, unit(form))
    floats, integers = vector("f32", lanes), vector("i32", lanes)
    if form == "f32":
        return codes
    if form == "f16":
        return fn.cast(codes, "arith.extf", floats)
    if form == "i8":
        return fn.cast(fn.cast(codes, "arith.extsi", integers), "arith.sitofp", floats)
    return fn.cast(fn.cast(codes, "arith.extui", integers) << 16, "arith.bitcast", floats)


def encode(fn: Fn, source: Val, dim: int, form: str, put: Callable[[Val | int, Val], None]) -> Val | None:
    """Store the float32 row at ``source``: ``put(first channel, codes)`` for eight channels at a time and the rest one by one.
    Returns the scale of the row, if it has one."""
    if not scaled(form):
        channels(fn, dim, lambda c, type: put(c, _narrow(fn, fn.load(source, type, c, "f32"), form)))
        return None
    scale = _largest(fn, source, dim) / _LIMIT
    low, high = fn.compare(scale, "ogt", 0.0), fn.compare(scale, "olt", inf)
    legal = fn.emit(f"arith.andi {low.name}, {high.name} : i1", "i1")
    divisor = fn.select(legal, scale, fn.const(1.0, "f32"))
    wide = fn.splat(divisor)

    def code(c: Val | int, type: str) -> None:
        quotient = fn.load(source, type, c, "f32") / (divisor if type == "f32" else wide)
        rounded = fn.minimum(fn.maximum(fn.math("roundeven", quotient), -_LIMIT), _LIMIT)
        whole = fn.cast(rounded, "arith.fptosi", like(type, "i32"))
        put(c, fn.cast(fn.select(legal, whole, fn.const(0, whole.type)), "arith.trunci", like(type, "i8")))

    channels(fn, dim, code)
    return scale


def _narrow(fn: Fn, x: Val, dtype: str) -> Val:
    """Float32 as it is stored, rounded to the nearest even."""
    if dtype == "f32":
        return x
    if dtype == "f16":
        return fn.cast(x, "arith.truncf", like(x.type, "f16"))
    bits = fn.cast(x, "arith.bitcast", like(x.type, "i32"))
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return fn.cast(rounded, "arith.trunci", like(x.type, "i16"))


def _largest(fn: Fn, source: Val, dim: int) -> Val:
    """The largest size in a row; not a number if one of them is."""
    whole, zero = dim // LANES * LANES, fn.const(0.0, VF)
    with fn.loop(0, whole, LANES, [zero]) as loop:
        loop.give(fn.maximum(loop.carried[0], fn.math("absf", fn.load(source, VF, loop.index, "f32"))))
    found = fn.top(loop.results[0])
    for i in range(whole, dim):
        found = fn.maximum(found, fn.math("absf", fn.load(source, "f32", i)))
    return found
