"""Sums of products of small integers, the way that a processor does them best.

A vector holds four consecutive codes of each of its outputs (32 bits a lane); the activations' four codes are the same for all
lanes. Every way gives the same integers:

============  ===============================================================================================
``vnni512``   ``vpdpbusd`` on 16 lanes (AVX-512 VNNI); signed weights become unsigned by adding 128, which `dot`'s caller takes
              off again with the sum of the activations
``avx2``      ``vpmaddubsw`` of |w| with x under w's sign, in pairs of 16 bits, then ``vpmaddwd``: |w| <= 128 and |x| <= 127
              keep two products within 16 bits; for four-bit codes eight such pairs do
``portable``  four multiplications of 32-bit lanes
============  ===============================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

from elision.codegen.cpu.emit import Fn, Val, vector
from elision.llvm.processor import needs


@dataclass(frozen=True)
class Way:
    """``lanes``: outputs of a vector; ``tiles``: tokens that share one reading of the weights, largest first; ``offset``: what is
    added to signed weights."""

    name: str
    lanes: int
    tiles: tuple[int, ...]
    offset: int = 0

    @property
    def codes(self) -> str:
        return vector("i8", 4 * self.lanes)

    @property
    def sums(self) -> str:
        return vector("i32", self.lanes)

    @property
    def floats(self) -> str:
        return vector("f32", self.lanes)


WAYS = {
    way.name: way
    for way in (Way("vnni512", 16, (8, 4, 2, 1), 128), Way("avx2", 8, (4, 2, 1)), Way("portable", 8, (2, 1)))
}


def best_way(level: str) -> Way:
    """The best way of processors of a feature level."""
    return WAYS["vnni512" if "avx512vnni" in needs(level) else "avx2" if "avx2" in needs(level) else "portable"]


class Dot:
    """Products of weights with codes of ``bits`` bits (8: signed, 4: unsigned) that are read once for several tokens."""

    def __init__(self, fn: Fn, way: Way, bits: int) -> None:
        self.fn, self.way, self.bits = fn, way, bits

    @property
    def offset(self) -> int:
        """What the sums have too much, per unit of the sum of the activations' codes."""
        return self.way.offset if self.bits == 8 else 0

    def weights(self, raw: Val) -> list[tuple[Val, ...]]:
        """Four inputs of every output, twice for four-bit codes (low nibbles, then high), as `add` takes them."""
        if self.bits == 8:
            return [self._prepared(raw)]
        return [self._prepared(raw & 15), self._prepared((raw >> 4) & 15)]

    def _prepared(self, codes: Val) -> tuple[Val, ...]:
        fn, signed = self.fn, self.bits == 8
        match self.way.name:
            case "vnni512":
                return (codes ^ -128,) if signed else (codes,)
            case "avx2":
                if not signed:
                    return (codes,)
                size = fn.emit(
                    f'"llvm.intr.abs"({codes.name}) <{{is_int_min_poison = false}}> : ({codes.type}) -> {codes.type}', codes.type
                )
                return size, codes
        words = fn.cast(codes, "vector.bitcast", self.way.sums)
        return tuple(_byte(fn, words, i, signed) for i in range(4))

    def add(self, total: Val | None, weights: tuple[Val, ...], x: Val) -> Val:
        """``total`` plus the products with the four activations at address ``x``."""
        fn, way = self.fn, self.way
        if way.name == "portable":
            for i, w in enumerate(weights):
                code = fn.splat(fn.cast(fn.load(x, "i8", i), "arith.extsi", "i32"), way.lanes)
                total = w * code if total is None else total + w * code
            assert total is not None
            return total
        codes = fn.cast(fn.splat(fn.load(x, "i32"), way.lanes), "vector.bitcast", way.codes)
        if way.name == "vnni512":
            total = fn.const(0, way.sums) if total is None else total
            return fn.intrinsic("llvm.x86.avx512.vpdpbusd.512", total, weights[0], codes, result=way.sums)
        if self.bits == 8:
            codes = fn.intrinsic("llvm.x86.avx2.psign.b", codes, weights[1], result=way.codes)
        pairs = fn.intrinsic("llvm.x86.avx2.pmadd.ub.sw", weights[0], codes, result=vector("i16", 2 * way.lanes))
        found = self._quads(pairs) if self.bits == 8 else pairs
        return found if total is None else total + found

    def total(self, total: Val) -> Val:
        """The 32-bit sums of what `add` gave."""
        return self._quads(total) if self.way.name == "avx2" and self.bits == 4 else total

    def _quads(self, pairs: Val) -> Val:
        return self.fn.intrinsic("llvm.x86.avx2.pmadd.wd", pairs, self.fn.const(1, pairs.type), result=self.way.sums)


def _byte(fn: Fn, words: Val, i: int, signed: bool) -> Val:
    """Byte i of every 32-bit lane, widened."""
    if not signed:
        return (words >> (8 * i)) & 255
    high = words << (24 - 8 * i) if i < 3 else words
    return fn.emit(f"arith.shrsi {high.name}, {fn.const(24, words.type).name} : {words.type}", words.type)
