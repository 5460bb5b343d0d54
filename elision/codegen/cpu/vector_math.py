"""Elementary functions on vectors of float32, within a few units in the last place (libm's would be called lane by lane).

The polynomials of exp, log and tanh are those of Cephes (Moshier 1989), that of erfc is Numerical Recipes' (1.2e-7 relative).
"""

from __future__ import annotations

from elision.codegen.cpu.emit import Fn, Val, lanes, like, vector


def polynomial(fn: Fn, x: Val, coefficients: tuple[float, ...]) -> Val:
    """Horner's scheme, the highest coefficient first."""
    found = fn.const(coefficients[0], x.type)
    for c in coefficients[1:]:
        found = fn.fma(found, x, fn.const(c, x.type))
    return found


def larger(fn: Fn, a: Val | float, b: Val) -> Val:
    """The larger of two; b if one of them is not a number (one instruction, where IEEE's maximum takes three)."""
    a = fn.value(a, b.type)
    return fn.select(fn.compare(a, "ogt", b), a, b)


def smaller(fn: Fn, a: Val | float, b: Val) -> Val:
    """The smaller of two; b if one of them is not a number."""
    a = fn.value(a, b.type)
    return fn.select(fn.compare(a, "olt", b), a, b)


def largest(fn: Fn, x: Val) -> Val:
    """The largest lane of a vector; lanes that are not numbers may be left out."""
    while (half := lanes(x.type) // 2) > 0:
        parts = (", ".join(str(i) for i in range(first, first + half)) for first in (0, half))
        shuffle = f"vector.shuffle {x.name}, {x.name}"
        low, high = (fn.emit(f"{shuffle} [{part}] : {x.type}, {x.type}", vector("f32", half)) for part in parts)
        x = larger(fn, low, high)
    return fn.extract(x, 0)


def exp(fn: Fn, x: Val) -> Val:
    x = smaller(fn, 88.3, larger(fn, -87.3, x))
    n = fn.math("roundeven", x * 1.44269504088896341)
    r = fn.fma(n, fn.const(-0.693359375, x.type), x)
    r = fn.fma(n, fn.const(2.12194440e-4, x.type), r)
    p = polynomial(
        fn, r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )
    y = fn.fma(p * r, r, r + 1.0)
    exponent = (fn.cast(n, "arith.fptosi", like(x.type, "i32")) + 127) << 23
    return y * fn.cast(exponent, "arith.bitcast", x.type)


def log(fn: Fn, x: Val) -> Val:
    """Of normal numbers above 0."""
    bits = fn.cast(x, "arith.bitcast", like(x.type, "i32"))
    half = fn.cast((bits & 0x7FFFFF) | 0x3F000000, "arith.bitcast", x.type)  # in [0.5, 1)
    small = fn.compare(half, "olt", 0.70710678)
    n = fn.cast((bits >> 23) - 126, "arith.sitofp", x.type) - fn.select(small, fn.const(1.0, x.type), fn.const(0.0, x.type))
    f = half + fn.select(small, half, fn.const(0.0, x.type)) - 1.0
    p = polynomial(
        fn, f, (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
                2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
    )  # fmt: skip
    z = f * f
    tail = fn.fma(n, fn.const(-2.12194440e-4, x.type), p * f * z) - z * 0.5
    return fn.fma(n, fn.const(0.693359375, x.type), f + tail)


def sigmoid(fn: Fn, x: Val) -> Val:
    return 1.0 / (exp(fn, -x) + 1.0)


def tanh(fn: Fn, x: Val) -> Val:
    size = fn.math("absf", x)
    far = 1.0 - 2.0 / (exp(fn, size * 2.0) + 1.0)
    far = fn.emit(f"math.copysign {far.name}, {x.name} : {x.type}", x.type)
    z = x * x
    near = polynomial(fn, z, (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1))
    return fn.select(fn.compare(size, "olt", 0.625), fn.fma(near * z, x, x), far)


def erf(fn: Fn, x: Val) -> Val:
    size = fn.math("absf", x)
    t = 1.0 / (size * 0.5 + 1.0)
    coefficients = (
        0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807,
        -0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223,
    )  # fmt: skip
    tail = t * exp(fn, polynomial(fn, t, coefficients) - size * size)
    far = 1.0 - tail
    far = fn.emit(f"math.copysign {far.name}, {x.name} : {x.type}", x.type)
    # Near zero 1 - erfc would lose digits: the Taylor series.
    z = x * x
    series = polynomial(fn, z, (5.2239776e-3, -2.6866171e-2, 1.1283792e-1, -3.7612639e-1, 1.1283792))
    return fn.select(fn.compare(size, "olt", 0.4), series * x, far)


def softplus(fn: Fn, x: Val) -> Val:
    small = exp(fn, -fn.math("absf", x))
    return fn.maximum(x, 0.0) + fn.math("log1p", small)
