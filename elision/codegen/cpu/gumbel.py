"""Weights of a noisy softmax, sixteen entries at a time (`elision.ir.gumbel`)."""

from __future__ import annotations

from dataclasses import dataclass

from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.emit import Fn, Val, element, lanes
from elision.codegen.cpu.kernel import Kernel
from elision.ir.gumbel import FACTORS, GOLDEN, SHIFTS
from elision.ir.layout import LANES
from elision.ir.states import Gumbel


@dataclass
class Noise:
    """The operands of a row that say which noise."""

    fn: Fn
    seed: Val
    amplitude: Val
    start: Val
    end: Val
    steps: Val

    @staticmethod
    def operands(gumbel: Gumbel | None) -> list[tuple[str, float]]:
        """What a row holds for `of`."""
        if gumbel is None:
            return []
        reals = (gumbel.amplitude, gumbel.start, gumbel.end, gumbel.steps)
        return [("int", gumbel.seed), *(("float", float(x)) for x in reals)]

    @staticmethod
    def of(kernel: Kernel) -> Noise:
        seed = kernel.fn.i32(kernel.integer("seed"))
        return Noise(kernel.fn, seed, *(kernel.real(n) for n in ("amplitude", "start", "end", "steps")))

    def key(self, head: Val, where: Val) -> Val:
        """What is the same for all keys of a query at a position."""
        fn = self.fn
        of_head = _mixed(self.seed + (fn.i32(head) + 1) * _signed(GOLDEN))
        return _mixed(of_head + fn.i32(where))

    def temperature(self, where: Val, prompt: Val) -> Val:
        """1 / tau of a query at a position."""
        fn = self.fn
        share = fn.cast(where - prompt + 1, "arith.sitofp", "f32") / self.steps
        share = fn.minimum(fn.maximum(share, 0.0), 1.0)
        return 1.0 / (self.start + (self.end - self.start) * share)

    def weight(self, logit: Val, key: Val, pos: Val, cold: Val) -> Val:
        """``exp((logit + g) cold)`` for ``pos`` (int32), one or a vector; ``logit`` is relative to the largest one."""
        fn, type = self.fn, logit.type
        wide = lanes(type) > 1
        key, cold, amplitude = (fn.splat(x, LANES) if wide else x for x in (key, cold, self.amplitude))
        bits = _mixed(key ^ (pos * _signed(GOLDEN)))
        uniform = (fn.cast(bits >> 9, "arith.uitofp", type) + 0.5) * 2.0**-23
        g = -vm.log(fn, -vm.log(fn, uniform))
        return vm.exp(fn, fn.fma(g, amplitude, logit) * cold)


def _mixed(x: Val) -> Val:
    assert element(x.type) == "i32"
    for shift, factor in zip(SHIFTS, FACTORS, strict=False):
        x = (x ^ (x >> shift)) * _signed(factor)
    return x ^ (x >> SHIFTS[-1])


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x

