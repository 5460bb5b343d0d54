"""Codes of two, four or eight bits with a scale, and perhaps a minimum, for a group: they become floats in registers as they are
read, ``low + scale * code`` (`elision.ir.encoding` is the meaning).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

from elision.codegen.cpu.emit import Fn, Val, lanes, like, vector
from elision.codegen.refusal import NotNative
from elision.ir.layout import LANES
from elision.ir.states import Int

MOST_GROUPS = 8  # of a key: its scales are read with those of the 15 others of a block


@dataclass(frozen=True)
class Grouped:
    """Groups of ``group`` channels of a row, or (``by_token``) of ``group`` rows of a channel."""

    bits: int
    by_token: bool
    group: int
    zero: bool

    @property
    def per(self) -> int:
        """Codes of a byte."""
        return 8 // self.bits

    @property
    def beside(self) -> tuple[str, ...]:
        """The arrays beside the codes."""
        return ("scale", "low") if self.zero else ("scale",)

    def width(self, dim: int) -> int:
        """Bytes of codes of a row."""
        return dim // self.per

    def groups(self, dim: int) -> int:
        """Scales of a row."""
        return dim // self.group

    def place(self, name: str, dim: int, slot: Val, block: Val) -> tuple[Val, str]:
        """Where a head has its part of an array beside the codes, from its first slot and its first group of rows on, and the
        type of its items."""
        return block * dim if self.by_token else slot * self.groups(dim), "f32"


def grouped(encoding: Int, dim: int, keys: bool) -> Grouped:
    """Raises NotNative for groups that kernels do not read: they take blocks of 16 keys, and 16 channels of a value."""
    found = Grouped(encoding.bits, encoding.axis == "token", encoding.group, encoding.zero)
    if found.by_token:
        legal = keys and found.group % LANES == 0
    elif keys:
        legal = found.group % found.per == 0 and found.groups(dim) <= MOST_GROUPS
    else:
        legal = (found.group % LANES == 0 or found.group == dim) and dim % (LANES // 2) == 0
    if not legal:
        which = "keys" if keys else "values"
        raise NotNative(f"a cache of {which} as {encoding.bits}-bit codes in groups of {encoding.group} {encoding.axis}s")
    return found


def floats(fn: Fn, codes: Val, form: Grouped, part: int = 0) -> Val:
    """Of a vector of bytes, the codes with index ``part`` of each, as float32 without their scale."""
    lanes = int(codes.type[7:-1].split("x")[0])
    integers = vector("i32", lanes)
    signed = form.bits == 8 and not form.zero
    wide = fn.cast(codes, "arith.extsi" if signed else "arith.extui", integers)
    if form.bits < 8:
        if part:
            wide = wide >> part * form.bits
        if part < form.per - 1:
            wide = wide & (2**form.bits - 1)
        if not form.zero:
            wide = wide - 2 ** (form.bits - 1)
    return fn.cast(wide, "arith.sitofp", vector("f32", lanes))


def scaled(fn: Fn, codes: Val, scale: Val, low: Val | None) -> Val:
    """``low + scale * code``"""
    return codes * scale if low is None else fn.fma(codes, scale, low)


# --- keys: a block is a vector of 16 rows for each channel ---------------------------------------------------------------


def key_sides(fn: Fn, form: Grouped, dim: int, beside: Mapping[str, Val], block: Val, channel: Val | int) -> list[Val]:
    """Scales (and minima) of a block of 16 rows at a channel: the same for all channels of its group, if groups are of
    channels."""
    if form.by_token:
        at = (block * LANES) // form.group * dim + channel
        return [fn.splat(fn.load(beside[name], "f32", at), LANES) for name in form.beside]
    count = form.groups(dim)
    if count == 1:
        return [fn.load(beside[name], vector("f32", LANES), block * LANES, "f32") for name in form.beside]
    assert isinstance(channel, int)
    order = ", ".join(str(i * count + channel // form.group) for i in range(LANES))
    found = []
    for name in form.beside:
        every = fn.load(beside[name], vector("f32", LANES * count), block * (LANES * count), "f32")
        text = f"vector.shuffle {every.name}, {every.name} [{order}] : {every.type}, {every.type}"
        found.append(fn.emit(text, vector("f32", LANES)))
    return found


# --- values: a row is vectors of up to 16 channels -----------------------------------------------------------------------


def value(fn: Fn, base: Val, beside: Mapping[str, Val], row: Val, channel: int, lanes: int, dim: int, form: Grouped) -> Val:
    """Channels ``channel .. channel + lanes - 1`` of a row, as floats."""
    bytes_ = lanes // form.per
    raw = fn.load(base, vector("i8", bytes_), row * form.width(dim) + channel // form.per, "i8")
    if form.per == 1:
        codes = floats(fn, raw, form)
    else:
        masks = 2**form.bits - 1
        parts = [(raw >> i * form.bits if i else raw) & masks for i in range(form.per)]
        while len(parts) > 1:  # those with index 0 and 2, 1 and 3, ..., then all
            half = len(parts) // 2
            parts = [_interleave(fn, parts[i], parts[i + half]) for i in range(half)]
        codes = fn.cast(parts[0], "arith.extui", vector("i32", lanes))
        codes = codes if form.zero else codes - 2 ** (form.bits - 1)
        codes = fn.cast(codes, "arith.sitofp", vector("f32", lanes))
    at = row * form.groups(dim) + channel // form.group
    sides = [fn.splat(fn.load(beside[name], "f32", at), lanes) for name in form.beside]
    return scaled(fn, codes, sides[0], sides[1] if form.zero else None)


def _interleave(fn: Fn, a: Val, b: Val) -> Val:
    lanes = int(a.type[7:-1].split("x")[0])
    wide = vector("i8", 2 * lanes)
    return fn.emit(f"vector.interleave {a.name}, {b.name} : {a.type} -> {wide}", wide)


# --- writing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """What the codes of a group are made with; ``legal``: it can be divided by."""

    low: Val | None
    scale: Val
    legal: Val


def span(fn: Fn, source: Val, first: Val | int, form: Grouped) -> Scale:
    """Of the group of float32 numbers that begins ``first`` after ``source``."""
    limit = 2 ** (form.bits - 1) - 1
    group, wide = fn.at(source, first, "f32"), LANES if form.group % LANES == 0 else 1
    type = vector("f32", LANES) if wide > 1 else "f32"
    start = fn.load(group, type, 0, "f32")
    with fn.loop(0, form.group, wide, [start, start]) as loop:
        x = fn.load(group, type, loop.index, "f32")
        loop.give(fn.minimum(loop.carried[0], x), fn.maximum(loop.carried[1], x))
    low, high = loop.results
    if wide > 1:
        low, high = -fn.top(-low), fn.top(high)
    if form.zero:
        scale = (high - low) / float(2 * limit + 1)
    else:
        scale = fn.maximum(fn.math("absf", low), fn.math("absf", high)) / float(limit)
    known = [fn.compare(scale, "ogt", 0.0), fn.compare(scale, "olt", inf)]
    legal = fn.emit(f"arith.andi {known[0].name}, {known[1].name} : i1", "i1")
    return Scale(low if form.zero else None, scale, legal)


def code(fn: Fn, x: Val, by: Scale, form: Grouped) -> tuple[Val, Val]:
    """The code of a number, or of each of a vector, as it is stored, and the number that it says."""
    limit, count = 2 ** (form.bits - 1) - 1, lanes(x.type)
    least, most = (0.0, 2.0 * limit + 1) if form.zero else (float(-limit), float(limit))
    offset = 0 if form.zero or form.bits == 8 else limit + 1

    def wide(y: Val) -> Val:
        return fn.splat(y, count) if count > 1 else y

    divisor = fn.select(by.legal, by.scale, fn.const(1.0, "f32"))
    quotient = (x if by.low is None else x - wide(by.low)) / wide(divisor)
    rounded = fn.minimum(fn.maximum(fn.math("roundeven", quotient), least), most)
    whole = fn.cast(rounded, "arith.fptosi", like(x.type, "i32"))
    found = fn.select(by.legal, whole, fn.const(0, whole.type))
    said = fn.cast(found, "arith.sitofp", x.type) * wide(by.scale)
    return found + offset if offset else found, said if by.low is None else said + wide(by.low)


def encode(
    fn: Fn, source: Val, dim: int, form: Grouped, put: Callable[[Val, Val], None], beside: Callable[[str, Val, Val], None],
    left: Val | None = None,
) -> None:  # fmt: skip
    """Store the float32 row at ``source``, in groups of channels: ``put(index, byte of codes)`` and ``beside(name, group,
    number)``; what the codes leave of it goes to ``left``."""
    assert not form.by_token
    with fn.loop(0, form.groups(dim)) as groups:
        first = groups.index * form.group
        by = span(fn, source, first, form)
        store_sides(by, lambda name, x: beside(name, groups.index, x))
        with fn.loop(0, form.group, form.per) as loop:
            bytes_ = []
            for i in range(form.per):
                x = fn.load(source, "f32", first + loop.index + i)
                found, said = code(fn, x, by, form)
                bytes_.append(found)
                if left is not None:
                    fn.store(x - said, left, first + loop.index + i)
            put((first + loop.index) // form.per, packed(fn, bytes_, form))


def store_sides(by: Scale, beside: Callable[[str, Val], None]) -> None:
    """``beside(name, number)``"""
    beside("scale", by.scale)
    if by.low is not None:
        beside("low", by.low)


def packed(fn: Fn, codes: list[Val], form: Grouped) -> Val:
    """The byte of as many codes as there are in one, or the bytes of as many vectors."""
    byte = codes[0]
    for i, more in enumerate(codes[1:], 1):
        byte = byte | (more << i * form.bits)
    return fn.cast(byte, "arith.trunci", like(byte.type, "i8"))
