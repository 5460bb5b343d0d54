"""A `map` expression as vector code."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from elision.codegen.cpu import vector_math as vm
from elision.codegen.cpu.emit import Fn, Num, Val
from elision.ir.expr import parse

Term = Val | Num

_FUNCTIONS: dict[str, Callable[[Fn, Val], Val]] = {
    "exp": vm.exp,
    "log": lambda fn, x: fn.math("log", x),
    "log1p": lambda fn, x: fn.math("log1p", x),
    "sqrt": lambda fn, x: fn.math("sqrt", x),
    "rsqrt": lambda fn, x: 1.0 / fn.math("sqrt", x),
    "tanh": vm.tanh,
    "erf": vm.erf,
    "sin": lambda fn, x: fn.math("sin", x),
    "cos": lambda fn, x: fn.math("cos", x),
    "abs": lambda fn, x: fn.math("absf", x),
    "floor": lambda fn, x: fn.math("floor", x),
    "sigmoid": vm.sigmoid,
    "relu": lambda fn, x: fn.maximum(x, 0.0),
    "silu": lambda fn, x: x * vm.sigmoid(fn, x),
    "gelu": lambda fn, x: x * 0.5 * (vm.erf(fn, x * 0.7071067811865476) + 1.0),
    "gelu_tanh": lambda fn, x: x * 0.5 * (vm.tanh(fn, (x * x * x * 0.044715 + x) * 0.7978845608028654) + 1.0),
    "softplus": vm.softplus,
}
_COMPARE = {ast.Lt: "olt", ast.LtE: "ole", ast.Gt: "ogt", ast.GtE: "oge", ast.Eq: "oeq", ast.NotEq: "une"}
_ARITHMETIC: dict[type, Callable[[Term, Term], Term]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def supported(text: str) -> bool:
    """Whether every part of the expression has vector code."""
    for node in ast.walk(parse(text)):
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            if node.func.id not in (*_FUNCTIONS, "minimum", "maximum", "where"):
                return False
        if isinstance(node, ast.BinOp):
            if type(node.op) not in _ARITHMETIC and not (type(node.op) is ast.Pow and _exponent(node) in _POWERS):
                return False
    return True


def evaluate(fn: Fn, text: str, operands: Sequence[Val]) -> Val:
    """The value of a supported expression for float operands of one type."""
    type = operands[0].type

    def of(node: ast.expr) -> Term:
        if isinstance(node, ast.Constant):
            return node.value  # type: ignore[return-value]
        if isinstance(node, ast.Name):
            return operands[int(node.id[1:])]
        if isinstance(node, ast.UnaryOp):
            return -of(node.operand)
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Pow):
                return _power(fn, fn.value(of(node.left), type), _exponent(node))
            return _ARITHMETIC[node.op.__class__](of(node.left), of(node.right))
        if isinstance(node, ast.Compare):
            left = fn.value(of(node.left), type)
            return fn.compare(left, _COMPARE[node.ops[0].__class__], fn.value(of(node.comparators[0]), type))
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        name, args = node.func.id, [fn.value(a, type) for a in map(of, node.args)]
        if name == "where":
            return fn.select(*args)
        if name in ("minimum", "maximum"):
            return getattr(fn, name)(*args)  # type: ignore[no-any-return]
        return _FUNCTIONS[name](fn, args[0])

    return fn.value(of(parse(text)), type)


_POWERS = (2, 3, 0.5, -0.5, -1)


def _exponent(node: ast.BinOp) -> float | None:
    """The constant exponent of a power."""
    sign, right = 1, node.right
    if isinstance(right, ast.UnaryOp):
        sign, right = -1, right.operand
    found = right.value if isinstance(right, ast.Constant) else None
    return sign * found if isinstance(found, int | float) else None


def _power(fn: Fn, x: Val, exponent: float | None) -> Val:
    match exponent:
        case 2:
            return x * x
        case 3:
            return x * x * x
        case -1:
            return 1.0 / x
        case _:
            root = fn.math("sqrt", x)
            return root if exponent == 0.5 else 1.0 / root
