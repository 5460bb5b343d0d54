"""The scalar expressions of `map` (`elision.ir.expr`) as Triton functions.

An expression is a closed set of operators, so its text is nearly Triton already. The function is made from source text, because
Triton reads the source of what it compiles; equal expressions are one function.
"""

from __future__ import annotations

import ast
import linecache
from functools import cache
from typing import Any

import triton
import triton.language as tl

from elision.codegen.triton import functions
from elision.ir.expr import parse

OPERANDS = 4


@cache
def expression(text: str, operands: int = OPERANDS) -> Any:
    """A Triton function of ``x0 .. x(operands - 1)``, float32."""
    body = ast.unparse(_Calls().visit(ast.parse(ast.unparse(parse(text)), mode="eval")))
    names = ", ".join(f"x{i}" for i in range(operands))
    source = f"def expression({names}):\n    return {body}\n"
    place = f"<elision expression {text}>"
    linecache.cache[place] = (len(source), None, source.splitlines(True), place)
    space = {"tl": tl, "functions": functions, "__name__": __name__}
    exec(compile(source, place, "exec"), space)  # text of a checked syntax tree over a closed set of functions
    return triton.jit(space["expression"])


class _Calls(ast.NodeTransformer):
    """Calls of functions become those of the module `functions`; a power becomes one too, and a remainder is Python's."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        assert isinstance(node.func, ast.Name)
        return ast.copy_location(_call(node.func.id, node.args), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        name = {ast.Pow: "power", ast.Mod: "remainder"}.get(type(node.op))
        return node if name is None else ast.copy_location(_call(name, [node.left, node.right]), node)


def _call(name: str, args: list[ast.expr]) -> ast.Call:
    function = ast.Attribute(
        ast.Name("functions", ast.Load()), f"{name}_" if hasattr(functions, f"{name}_") else name, ast.Load()
    )
    return ast.Call(function, args, [])
