"""Scalar expressions: what `map` computes for every element.

An expression is Python text over the operands ``x0, x1, ..`` in a closed set of functions, for example ``silu(x0) * x1``.
It is parsed with `ast`, never executed as code, and kept in canonical form, so that equal expressions are equal strings.
"""

from __future__ import annotations

import ast
import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from elision.errors import BadInput

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
    "abs": torch.abs,
    "floor": torch.floor,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "minimum": lambda a, b: torch.clamp(a, max=b) if not isinstance(b, torch.Tensor) else torch.minimum(a, b),
    "maximum": lambda a, b: torch.clamp(a, min=b) if not isinstance(b, torch.Tensor) else torch.maximum(a, b),
    "where": torch.where,
}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: a**b,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
}


@lru_cache(maxsize=4096)
def parse(text: str) -> ast.expr:
    """The checked syntax tree. Raises BadInput for anything outside the closed set."""
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise BadInput(f"map: {text!r} is not an expression: {err}") from err
    if _depth(tree) > _DEEPEST:
        raise BadInput(f"map: an expression of more than {_DEEPEST} levels: {text!r:.80}")
    if not _reads(tree):
        raise BadInput(f"map: {text!r} reads no operand; operands are x0, x1, ...")
    _check(tree, text)
    return tree


_ARITY = {"minimum": 2, "maximum": 2, "where": 3}  # the others take one
_OPERAND = re.compile("x(0|[1-9][0-9]{0,3})")
_DEEPEST = 100  # levels of an expression


def _check(node: ast.expr, text: str) -> None:
    parts = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)]
    if isinstance(node, ast.Call):
        name, parts = _function(node), node.args
        if name not in FUNCTIONS:
            raise BadInput(f"map: unknown function {name!r} in {text!r}; expected one of {', '.join(FUNCTIONS)}")
        if len(parts) != _ARITY.get(name, 1) or node.keywords or not _reads(parts[0]):
            raise BadInput(f"map: {text!r}: {name} takes {_ARITY.get(name, 1)} operands, the first not constant")
    elif isinstance(node, ast.Name):
        if not _OPERAND.fullmatch(node.id):
            raise BadInput(f"map: unknown name {node.id!r} in {text!r}; operands are x0, x1, ...")
    elif isinstance(node, ast.Constant):
        value = node.value
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
            raise BadInput(f"map: {value!r:.40} in {text!r:.80} is not a finite number")
    elif isinstance(node, ast.BinOp | ast.Compare):
        operators = node.ops if isinstance(node, ast.Compare) else [node.op]
        if len(operators) != 1 or type(operators[0]) not in {**_BINARY, **_COMPARE} or not _reads(node):
            raise BadInput(f"map: {ast.unparse(node)!r} is not allowed: it is constant, a chain, or of an unknown operator")
    elif not (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)):
        raise BadInput(f"map: {type(node).__name__} is not allowed in {text!r}")
    for part in parts:
        _check(part, text)


def _function(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else "?"


def _depth(tree: ast.expr) -> int:
    depth, level = 0, [tree]
    while level:
        depth, level = depth + 1, [c for n in level for c in ast.iter_child_nodes(n) if isinstance(c, ast.expr)]
    return depth


def _reads(node: ast.expr) -> bool:
    """Whether the value of a sub-expression depends on an operand."""
    return any(isinstance(n, ast.Name) and n.id not in FUNCTIONS for n in ast.walk(node))


def canonical(text: str) -> str:
    """The expression's one spelling."""
    return ast.unparse(parse(text))


@lru_cache(maxsize=4096)
def operands(text: str) -> int:
    """How many operands the expression reads: one more than the largest index."""
    return max((int(n.id[1:]) + 1 for n in ast.walk(parse(text)) if isinstance(n, ast.Name) and n.id not in FUNCTIONS), default=0)


@lru_cache(maxsize=4096)
def flops(text: str) -> int:
    """Arithmetic operations per element: one per operator or function."""
    return sum(isinstance(n, ast.BinOp | ast.UnaryOp | ast.Compare | ast.Call) for n in ast.walk(parse(text)))


@lru_cache(maxsize=4096)
def compiled(text: str) -> Callable[..., torch.Tensor]:
    """A function of the operands, as tensors, in their dtype."""
    return _build(parse(text))


def _build(node: ast.expr) -> Callable[..., Any]:
    if isinstance(node, ast.Constant):
        value = node.value
        return lambda *x: value
    if isinstance(node, ast.Name):
        index = int(node.id[1:])
        return lambda *x: x[index]
    if isinstance(node, ast.UnaryOp):
        inner = _build(node.operand)
        return lambda *x: -inner(*x)
    if isinstance(node, ast.BinOp):
        left, right, act = _build(node.left), _build(node.right), _BINARY[type(node.op)]
        return lambda *x: act(left(*x), right(*x))
    if isinstance(node, ast.Compare):
        left, right, act = _build(node.left), _build(node.comparators[0]), _COMPARE[type(node.ops[0])]
        return lambda *x: act(left(*x), right(*x))
    if isinstance(node, ast.Call):
        function, args = FUNCTIONS[_function(node)], [_build(a) for a in node.args]
        return lambda *x: function(*(a(*x) for a in args))
    raise BadInput(f"map: {ast.unparse(node)!r} is not allowed")


def number(value: float) -> str:
    """A constant as expression text. Raises BadInput if it is not finite."""
    if not math.isfinite(value):
        raise BadInput(f"map: constant {value!r} is not finite")
    return repr(value)
