"""The kernel of `topk`: the k largest of a row of numbers, in descending order, ties to the smaller index."""

from __future__ import annotations

from elision.codegen.cpu.emit import Fn, Val, vector
from elision.codegen.cpu.kernel import Kernel

WIDE = 16
MOST = 16  # beyond so many, insertion costs more than reading


def topk(name: str, width: int, k: int) -> Kernel:
    """Reads the numbers once; a block of 16 with none above the k-th so far costs one comparison."""
    kernel = Kernel(name)
    fn = kernel.fn
    axis, x, values, index = kernel.axis(), kernel.tensor("x"), kernel.tensor("values"), kernel.tensor("index")
    whole = width // WIDE * WIDE
    with kernel.tokens(axis) as t:
        source, best, where = x.token(t), values.token(t), index.token(t, "i64")
        for j in range(k):
            fn.store(fn.const(-float("inf"), "f32"), best, j)
            fn.store(fn.const(j, "i64"), where, j)
        with fn.loop(0, whole, WIDE) as block:
            found = fn.load(source, vector("f32", WIDE), block.index, "f32")
            above = fn.compare(found, "ogt", fn.splat(fn.load(best, "f32", k - 1), WIDE))
            some = fn.emit(f"vector.reduction <or>, {above.name} : {above.type} into i1", "i1")
            with fn.when(some), fn.loop(block.index, block.index + WIDE) as each:
                _insert(fn, source, each.index, best, where, k)
        with fn.loop(whole, width) as each:
            _insert(fn, source, each.index, best, where, k)
    return kernel


def _insert(fn: Fn, source: Val, i: Val, best: Val, where: Val, k: int) -> None:
    """Number ``i`` pushes down those that it is larger than."""
    x = fn.load(source, "f32", i)
    with fn.when(fn.compare(x, "ogt", fn.load(best, "f32", k - 1))):
        value, place = x, i
        for j in range(k):
            old, at = fn.load(best, "f32", j), fn.load(where, "i64", j)
            larger = fn.compare(x, "ogt", old)
            fn.store(fn.select(larger, value, old), best, j)
            fn.store(fn.select(larger, place, at), where, j)
            value, place = fn.select(larger, old, value), fn.select(larger, at, place)
