"""Weights in panels as vectors of float32, format by format (`elision.ir.packing` has the places of their bits).

A weight is ``(code - offset) * scale + minimum``: a product sums ``code * x`` and applies the rest once for the weights of a
step. ``lane`` takes one output of the panel instead of all sixteen. """

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from elision.codegen.cpu.emit import Fn, Val, like, vector
from elision.ir.panels import PANEL, QUAD, panel_layout, run_bytes
from elision.ir.weights import weight_encoding

PLAIN = {"f32": "f32", "BF16": "i16", "F16": "f16"}  # formats that are a number per weight, and the type that is read
VP = vector("f32", PANEL)


@dataclass(frozen=True)
class Step:
    """Weights of consecutive inputs: ``(codes[i] - offset) * scale + minimum``, all float32; vectors, or scalars of one lane."""

    codes: list[Val]
    offset: float
    scale: Val
    minimum: Val | None

    def values(self) -> list[Val]:
        """The weights, rounded as `elision.ir.blocks` says."""
        found = [(c - self.offset if self.offset else c) * self.scale for c in self.codes]
        return found if self.minimum is None else [w + self.minimum for w in found]

    def shift(self) -> Val | None:
        """What the sum of the inputs is multiplied by."""
        if self.minimum is None and self.offset:
            return self.scale * -self.offset
        return self.minimum


class Decoder:
    """Reads the panels of encoded weights of ``k`` inputs, ``size`` of them a step."""

    def __init__(self, fn: Fn, format: str, k: int) -> None:
        layout = panel_layout(weight_encoding(format), k)
        assert layout is not None
        self._fn, self._layout = fn, layout
        self.size = gcd(layout.run, 32)
        self.steps = k // self.size
        self.shifted = len(layout.numbers) > 1 or layout.offset > 0

    def at(self, panel: Val, index: Val, lane: Val | None = None) -> Step:
        """The weights from input ``index * size`` on."""
        fn, layout = self._fn, self._layout
        parts, runs = layout.run // self.size, layout.elements // layout.run
        block, run, part = index // (parts * runs), (index // parts) % runs, index % parts
        base = fn.at(panel, block * (PANEL * layout.nbytes))

        def load(place: Val, type: str, at: Val | int, size: int) -> Val:
            """``size`` bytes per output from byte ``at`` on."""
            if lane is None:
                return fn.load(fn.at(place, at), vector(type, PANEL))
            return fn.load(fn.at(fn.at(place, at), lane * size), type)

        numbers = [
            fn.cast(half, "arith.extf", like(half.type, "f32"))
            for half in (load(base, "f16", 2 * PANEL * i, 2) for i in range(len(layout.numbers)))
        ]
        scale, minimum = numbers[0], numbers[1] if len(numbers) > 1 else None
        if layout.scales:
            scales = fn.at(base, 2 * PANEL * len(numbers))
            if minimum is None:
                scale = scale * self._float(self._wide(load(scales, "i8", run * PANEL, 1), "arith.extsi"))
            else:
                both = self._wide(load(scales, "i8", run * PANEL, 1))
                high = self._wide(load(scales, "i8", (run // 2 + 8) * PANEL, 1))
                shift = fn.i32((run % 2) * 4)
                high = high >> (shift if lane is not None else fn.splat(shift, PANEL))
                scale = scale * self._float((both & 15) | (high & 3) << 4)
                minimum = -(minimum * self._float(both >> 4 | ((high >> 2) & 3) << 4))
        place = fn.at(base, PANEL * layout.head_bytes + run * (PANEL * run_bytes(layout)))
        above = None
        if layout.high:
            above = load(place, "i32", 0, QUAD)
            place = fn.at(place, PANEL * QUAD)
        codes = []
        bytes = self.size * layout.bits // 8
        for i in range(bytes // QUAD):
            found = load(place, "i32", part * (PANEL * bytes) + PANEL * QUAD * i, QUAD)
            codes += self._signed(found) if layout.bits == 8 else self._nibbles(found, above, 2 * i)
        if layout.bits == 8:
            scale = scale * 2.0**-24
        return Step(codes, float(layout.offset), scale, minimum)

    def _signed(self, found: Val) -> list[Val]:
        """Four signed bytes as numbers, 2^24 times as large: a byte at the top of an integer needs no more shifts."""
        return [self._float(_shifted(found, 24 - 8 * j) & -(1 << 24) if j else found << 24) for j in range(QUAD)]

    def _nibbles(self, found: Val, above: Val | None, quad: int) -> list[Val]:
        codes = []
        for i, four in enumerate((found & 0x0F0F0F0F, (found >> 4) & 0x0F0F0F0F)):
            if above is not None:
                bits = self._layout.high
                mask = (2**bits - 1) * 0x10101010
                four = four | (_shifted(above, 4 - bits * (quad + i)) & mask)
            codes += [self._float((four >> 8 * j if j else four) & 255 if j < 3 else four >> 24) for j in range(QUAD)]
        return codes

    def _wide(self, x: Val, op: str = "arith.extui") -> Val:
        return self._fn.cast(x, op, like(x.type, "i32"))

    def _float(self, x: Val) -> Val:
        return self._fn.cast(x, "arith.sitofp", like(x.type, "f32"))


def _shifted(x: Val, left: int) -> Val:
    return x << left if left > 0 else x >> -left if left else x


def plain(fn: Fn, format: str, base: Val, type: str, at: Val | int) -> Val:
    """Weights ``at`` .. in a format of `PLAIN`, as ``type`` (f32 or a vector of it)."""
    found = fn.load(base, like(type, PLAIN[format]), at, PLAIN[format])
    if format == "F16":
        return fn.cast(found, "arith.extf", type)
    return found if format == "f32" else fn.cast(fn.cast(found, "arith.extui", like(type, "i32")) << 16, "arith.bitcast", type)
