"""What makes good the rounding of a block, natively (`elision.ir.repair` is the meaning): the numbers of a block lie vector by
vector, channels of all rows for keys, rows of all channels for values, and outliers are those of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from elision.codegen.cpu.cache_rows import Form
from elision.codegen.cpu.emit import LANES, VF, Fn, Val
from elision.codegen.cpu.mended import Mended
from elision.ir.repair import LARGEST, LOOPS, start

_FAR = float("inf")


def floats(block: int, dims: tuple[int, int], forms: tuple[Form, Form]) -> int:
    """Floats that `low_rank` needs."""
    return max((form.rank if isinstance(form, Mended) else 0) * (block + dim) for form, dim in zip(forms, dims, strict=True))


def take_out(fn: Fn, form: Mended, dim: int, size: int, block: Val, arrays: Mapping[str, Val], x: Val) -> None:
    """Outliers of the vectors ``x`` are kept, and the mean of their vector takes their place."""
    count, keys = form.outliers, form.codes.by_token
    vectors, length = (dim, size) if keys else (size, dim)
    if not count:
        return
    with fn.loop(0, vectors) as loop:
        source = fn.at(x, loop.index * length, "f32")
        with fn.loop(0, length, LANES, [fn.const(0.0, VF)]) as total:
            total.give(total.carried[0] + fn.load(source, VF, total.index, "f32"))
        mean = fn.sum(total.results[0]) / float(length)
        places = []
        for sign in (1.0, -1.0):
            last, before = fn.const(_FAR, "f32"), fn.const(-1, "i64")
            for _ in range(count):
                last, before = _next(fn, source, length, sign, last, before)
                places.append((last * sign, before))
        for j, (number, place) in enumerate(places):
            at = _item(form, dim, size, block, loop.index, j)
            low = fn.minimum(fn.maximum(number, -LARGEST), LARGEST)
            fn.store(fn.cast(low, "arith.truncf", "f16"), arrays["outlier"], at)
            fn.store(fn.cast(place, "arith.trunci", "i8"), arrays["place"], at)
        for _, place in places:
            fn.store(mean, source, place)


def _next(fn: Fn, source: Val, length: int, sign: float, last: Val, before: Val) -> tuple[Val, Val]:
    """The largest number times ``sign`` after ``last``, which is that at ``before``, and where it is; of equal ones the first."""
    with fn.loop(0, length, 1, [fn.const(-_FAR, "f32"), fn.const(0, "i64")]) as loop:
        number = fn.load(source, "f32", loop.index) * sign
        equal = fn.emit(
            f"arith.andi {fn.compare(number, 'oeq', last).name}, {fn.compare(loop.index, 'sgt', before).name} : i1", "i1"
        )
        left = fn.emit(f"arith.ori {fn.compare(number, 'olt', last).name}, {equal.name} : i1", "i1")
        better = fn.emit(f"arith.andi {left.name}, {fn.compare(number, 'ogt', loop.carried[0]).name} : i1", "i1")
        loop.give(fn.select(better, number, loop.carried[0]), fn.select(better, loop.index, loop.carried[1]))
    return loop.results[0], loop.results[1]


def _item(form: Mended, dim: int, size: int, block: Val, vector: Val, j: int) -> Val:
    """Where outlier ``j`` of a vector is kept."""
    many = 2 * form.outliers
    return (block * many + j) * dim + vector if form.codes.by_token else (block * size + vector) * many + j


def low_rank(
    fn: Fn, form: Mended, dim: int, size: int, block: Val, arrays: Mapping[str, Val], x: Val, memory: Val
) -> None:  # fmt: skip
    """The matrix close to what codes leave, ``x``, where outliers leave nothing. Power iteration; columns lie side by side."""
    rank, keys, many = form.rank, form.codes.by_token, 2 * form.outliers
    vectors, length = (dim, size) if keys else (size, dim)
    if many:
        with fn.loop(0, vectors) as loop:
            for j in range(many):
                place = fn.load(arrays["place"], "i8", _item(form, dim, size, block, loop.index, j))
                place = fn.cast(place, "arith.extui", "i64")
                fn.store(fn.const(0.0, "f32"), x, loop.index * length + place)
    left, right = memory, fn.at(memory, rank * size, "f32")
    for i, column in enumerate(start(dim, rank, torch.float32).T.tolist()):
        for j, number in enumerate(column):
            fn.store(fn.const(number, "f32"), right, i * dim + j)

    def times(source: Val, out: Val, along: bool) -> None:
        """Products of the vectors with columns as long as they are, or (not ``along``) their sums weighted by columns."""
        for r in range(rank):
            column = fn.at(source, r * (length if along else vectors), "f32")
            target = fn.at(out, r * (vectors if along else length), "f32")
            if along:
                with fn.loop(0, vectors) as loop:
                    fn.store(_dot(fn, fn.at(x, loop.index * length, "f32"), column, length), target, loop.index)
                continue
            with fn.loop(0, length, LANES) as part:
                with fn.loop(0, vectors, 1, [fn.const(0.0, VF)]) as loop:
                    row = fn.load(x, VF, loop.index * length + part.index, "f32")
                    loop.give(fn.fma(row, fn.splat(fn.load(column, "f32", loop.index)), loop.carried[0]))
                fn.store(loop.results[0], target, part.index, "f32")

    for i in range(LOOPS):
        if i == LOOPS - 1:
            _orthogonal(fn, right, rank, dim)
        times(right, left, along=not keys)
        if i == LOOPS - 1:
            _orthogonal(fn, left, rank, size)
        times(left, right, along=keys)
    for column, rows, name in ((left, size, "left"), (right, dim, "right")):
        with fn.loop(0, rows) as loop:
            for r in range(rank):
                number = fn.minimum(fn.maximum(fn.load(column, "f32", loop.index + r * rows), -LARGEST), LARGEST)
                fn.store(fn.cast(number, "arith.truncf", "f16"), arrays[name], (block * rows + loop.index) * rank + r)


def _dot(fn: Fn, a: Val, b: Val, length: int) -> Val:
    with fn.loop(0, length, LANES, [fn.const(0.0, VF)]) as loop:
        loop.give(fn.fma(fn.load(a, VF, loop.index, "f32"), fn.load(b, VF, loop.index, "f32"), loop.carried[0]))
    return fn.sum(loop.results[0])


def _orthogonal(fn: Fn, columns: Val, rank: int, length: int) -> None:
    """Columns become orthogonal and of length 1, those that are nothing beside the ones before stay nothing (Gram and Schmidt,
    twice)."""
    for r in range(rank):
        mine = fn.at(columns, r * length, "f32")
        for other in (fn.at(columns, o * length, "f32") for _ in range(2) for o in range(r)):
            share = fn.splat(_dot(fn, mine, other, length))
            with fn.loop(0, length, LANES) as loop:
                x = fn.load(mine, VF, loop.index, "f32") - fn.load(other, VF, loop.index, "f32") * share
                fn.store(x, mine, loop.index, "f32")
        square = _dot(fn, mine, mine, length)
        some = fn.compare(square, "ogt", 0.0)
        scale = fn.select(some, 1.0 / fn.math("sqrt", fn.select(some, square, fn.const(1.0, "f32"))), fn.const(0.0, "f32"))
        with fn.loop(0, length, LANES) as loop:
            fn.store(fn.load(mine, VF, loop.index, "f32") * fn.splat(scale), mine, loop.index, "f32")
