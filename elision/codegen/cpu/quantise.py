"""Rounding activations to int8, as `elision.ir.integers.rounded` says: each token becomes one block of bytes.

A block over k channels, with g = k / 32 groups: codes ``i8[k]``, scales ``f32[g]``, the sum of each group's codes times its scale
``f32[g]`` (for weights with a minimum), the sum itself ``i32[g]`` (for codes with an offset). """

from __future__ import annotations

from dataclasses import dataclass

from elision.codegen.cpu.emit import LANES, VF, VI, Fn, Val
from elision.codegen.cpu.kernel import Kernel
from elision.ir.integers import LEAST
from elision.ir.weights import GROUP


def block_bytes(k: int) -> int:
    """Bytes of the block of one token."""
    return k + 3 * 4 * (k // GROUP)


@dataclass(frozen=True)
class Block:
    """A token's block at an address."""

    fn: Fn
    base: Val
    k: int

    def code(self, at: Val) -> Val:
        """The address of the code of channel ``at``."""
        return self.fn.at(self.base, at)

    def scale(self) -> Val:
        """The address of the scales; `scaled_sum` and `sum` likewise."""
        return self._field(0)

    def scaled_sum(self) -> Val:
        return self._field(1)

    def sum(self) -> Val:
        return self._field(2)

    def _field(self, i: int) -> Val:
        return self.fn.at(self.base, self.k + i * 4 * (self.k // GROUP))


def quantise(name: str, k: int) -> Kernel:
    """The kernel that writes the blocks of tokens with ``k`` channels."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, out = kernel.axis(), kernel.tensor("x"), kernel.tensor("out")
    with kernel.tokens(axis) as t:
        source, block = x.token(t), Block(fn, out.token(t, "i8"), k)
        codes, scales, scaled, sums = block.base, block.scale(), block.scaled_sum(), block.sum()
        with fn.loop(0, k // GROUP) as loop:
            channels = loop.index * GROUP
            place = fn.at(source, channels, "f32")
            values = [fn.load(place, VF, i * LANES) for i in range(GROUP // LANES)]
            most = _most(fn, values)
            inverse = fn.splat(127.0 / most)
            rounded = [fn.cast(fn.math("roundeven", v * inverse), "arith.fptosi", VI) for v in values]
            for i, code in enumerate(rounded):
                fn.store(fn.cast(code, "arith.trunci", f"vector<{LANES}xi8>"), codes, channels + i * LANES)
            total = fn.sum((rounded[0] + rounded[1]) + (rounded[2] + rounded[3]))
            scale = most / 127.0
            fn.store(scale, scales, loop.index)
            fn.store(fn.cast(total, "arith.sitofp", "f32") * scale, scaled, loop.index)
            fn.store(total, sums, loop.index)
    return kernel


def _most(fn: Fn, values: list[Val]) -> Val:
    """The largest size of a group, at least `LEAST`. Compared as integers, so that what is not a number wins and shows."""
    sizes = [fn.cast(v, "arith.bitcast", VI) & 0x7FFFFFFF for v in values]
    top = fn.top(fn.maximum(fn.maximum(sizes[0], sizes[1]), fn.maximum(sizes[2], sizes[3])))
    least = fn.cast(fn.const(LEAST, "f32"), "arith.bitcast", "i32")
    return fn.cast(fn.maximum(top, least), "arith.bitcast", "f32")
