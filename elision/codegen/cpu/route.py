"""The kernel of `route`: the experts of every token, and their gates."""

from __future__ import annotations

from dataclasses import dataclass

from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.emit import Fn, Val
from elision.codegen.cpu.kernel import Kernel

LEAST = -3.4e38


@dataclass(frozen=True)
class Route:
    """What is fixed in the code: the attributes of the op, and whether it has a bias."""

    experts: int
    k: int
    kind: str = "softmax"
    renormalise: bool = True
    eps: float = 0.0
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    biased: bool = False

    @property
    def scratch_bytes(self) -> int:
        """What is compared of every expert, a copy of that, and the sums of groups."""
        return 4 * (2 * self.experts + self.groups)


def route(name: str, site: Route) -> Kernel:
    """The k largest of every token one after the other, ties to the smaller index."""
    kernel = Kernel(name)
    fn, count = kernel.fn, site.experts
    axis, x, weight, index, scratch = (kernel.axis(), *(kernel.tensor(n) for n in ("x", "weight", "index", "scratch")))
    bias = kernel.weight("bias") if site.biased else None
    scores, copy, sums = (fn.at(scratch.base, i * count, "f32") for i in range(3))
    with kernel.tokens(axis) as t:
        logits, gates, chosen = x.token(t), weight.token(t), index.token(t, "i64")
        with fn.loop(0, count, 1, [fn.const(LEAST, "f32")]) as loop:
            loop.give(fn.maximum(loop.carried[0], fn.load(logits, "f32", loop.index)))
        top = loop.results[0]
        with fn.loop(0, count, 1, [fn.const(0.0, "f32")]) as loop:
            loop.give(loop.carried[0] + vm.exp(fn, fn.load(logits, "f32", loop.index) - top))
        total = loop.results[0]

        def gate(logit: Val) -> Val:
            return vm.exp(fn, logit - top) / total if site.kind == "softmax" else vm.sigmoid(fn, logit)

        with fn.loop(0, count) as loop:
            logit = fn.load(logits, "f32", loop.index)
            worth = gate(logit) + fn.load(bias, "f32", loop.index) if bias is not None else gate(logit)
            fn.store(worth if bias is not None else logit, scores, loop.index)
            if site.groups > site.top_groups:
                fn.store(worth, copy, loop.index)
        if site.groups > site.top_groups:
            _leave_groups(fn, site, scores, copy, sums)
        kept = fn.const(0.0, "f32")
        for j in range(site.k):
            place = _take(fn, scores, count)[1]
            p = gate(fn.load(logits, "f32", place))
            kept = kept + p
            fn.store(p, gates, j)
            fn.store(place, chosen, j)
        for j in range(site.k):
            p = fn.load(gates, "f32", j)
            fn.store((p / (kept + site.eps) if site.renormalise else p) * site.scale, gates, j)
    return kernel


def _take(fn: Fn, numbers: Val, count: int) -> tuple[Val, Val]:
    """The largest number and the first place where it is; it is struck out there."""
    struck = fn.const(-float("inf"), "f32")
    with fn.loop(0, count, 1, [struck, fn.const(0, "i64")]) as loop:
        value = fn.load(numbers, "f32", loop.index)
        better = fn.compare(value, "ogt", loop.carried[0])
        loop.give(fn.select(better, value, loop.carried[0]), fn.select(better, loop.index, loop.carried[1]))
    best, place = loop.results
    fn.store(struck, numbers, place)
    return best, place


def _leave_groups(fn: Fn, site: Route, scores: Val, worth: Val, sums: Val) -> None:
    """Strike out the experts of all groups but the ``top_groups``; what is kept is copied aside and back."""
    size = site.experts // site.groups
    with fn.loop(0, site.groups) as loop:
        group = fn.at(worth, loop.index * size, "f32")
        total = fn.const(0.0, "f32")
        for _ in range(site.group_best):
            total = total + _take(fn, group, size)[0]
        fn.store(total, sums, loop.index)
    with fn.loop(0, site.experts) as loop:
        fn.store(fn.load(scores, "f32", loop.index), worth, loop.index)
        fn.store(fn.const(-float("inf"), "f32"), scores, loop.index)
    for _ in range(site.top_groups):
        first = _take(fn, sums, site.groups)[1] * size
        with fn.loop(0, size) as loop:
            fn.store(fn.load(worth, "f32", first + loop.index), scores, first + loop.index)
