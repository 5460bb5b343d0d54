"""Is what was raised what was captured? Numerical checks of every template and of the whole model.

A check compares in float64, with float casts widened on both sides, so that what is left is rounding only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

from elision.errors import UnsupportedModel
from elision.frontend.anchors import TOLERANCE
from elision.frontend.capture import Captured
from elision.frontend.evaluate import evaluate
from elision.frontend.structure import Segment
from elision.frontend.token_major import Layouts, check_tokens
from elision.ir.interp import Interpreter
from elision.ir.mask import Mask
from elision.ir.program import Program, vocabulary
from elision.ir.states import KV, Float
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES, FLOATS, Axis
from elision.ir.types import Tensor as TensorType
from elision.ir.value import Builder, Graph, Value, rewrite

FAULT = "This is a fault of the frontend: please report the model"
#: Whole model in its own dtype: largest difference relative to the largest logit. Models force float32 inside norms and
#: rope, which in a float64 model the ops do not.
MODEL_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
_HALF = (torch.bfloat16, torch.float16)


def check_template(
    graph: Graph,
    segment: Segment,
    captured: Captured,
    layouts: Layouts,
    weights: list[Tensor],
    mask: Mask | None,
    first: int,
    tables: Callable[[Tensor], dict[fx.Node, Tensor]],
) -> None:
    """Evaluate the template and the captured block on the same random stream, at positions from ``first`` on. Raises
    UnsupportedModel on a difference.

    ``tables(positions)`` are the values of the block's position tables that the model has only rounded.
    """
    layout = layouts.of(segment.start)
    end = layouts.of(segment.end)
    assert layout is not None and end is not None
    length = layouts.length(5)
    x = layout.random(2, length, seed=0)
    positions, at = check_tokens(2, length, first)
    given: dict[fx.Node, Tensor] = {segment.start: x, **tables(positions)}
    want = end.tokens(evaluate(captured, [segment.end], positions, given=given, wide=True)[0])
    inputs = [layout.tokens(x), *(w.double() if w.is_floating_point() else w for w in weights)]
    wide = widen(graph)
    env = {"mask": mask} if mask is not None else {}
    found = Interpreter(Program(graph.name), {}).run(wide, _named(wide, inputs), {"t": at}, env)[0]
    error = float((found - want).abs().max()) / max(1e-30, float(want.abs().max()))
    if not error <= TOLERANCE:
        raise UnsupportedModel(
            f"template {graph.name} of layer {segment.layer} differs from the model by {error:.2e} (relative, float64); "
            f"expected at most {TOLERANCE:.0e}. {FAULT}"
        )


def check_program(program: Program, weights: dict[str, Tensor], captured: Captured) -> None:
    """Compare the raised model's outputs with the captured one's on random inputs, in the model's own dtype.

    A model that was captured with an ``attention_mask`` is compared on a padded batch, where the tokens are valid.
    """
    score = program.entries["score"]
    padded = "valid" in captured.kinds.values()
    lengths = [9, 6] if padded else [9, 9]
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    axes = {"t": Tokens.chunk(lengths, [0, 0]), "b": Tokens.chunk([1, 1], [0, 0])}
    given: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    formals = iter(score.inputs)
    for name in captured.inputs:
        if captured.kinds[name] == "token":
            formal = next(formals)
            if formal.tensor.dtype not in FLOATS and not vocabulary(score, formal):
                raise UnsupportedModel(f"the input {name} is not the index of a table")
            whole = (2,) if formal.tensor.tokens == Axis("b") else (2, 9)
            given[name] = _draw(formal.tensor, vocabulary(score, formal), whole, seed=len(given))
            inputs[score.names[formal]] = given[name] if len(whole) == 1 else given[name][valid]
        else:
            given[name] = torch.arange(9).expand(2, 9).contiguous() if captured.kinds[name] == "position" else valid.long()
    want = captured.run(**given)
    found = Interpreter(program, weights).run(score, inputs, axes)
    routed = any(v.op == "route" for graph in program.templates.values() for v in graph.values)
    for name, output, value in zip(captured.outputs, score.outputs, found, strict=True):
        exact, axis = want[name], output.tensor.tokens
        if axis is not None and axis.parent is None:  # not one value per sequence
            exact = exact[valid] if padded else exact.flatten(0, 1)
        if exact.shape != value.shape:
            raise UnsupportedModel(f"{name} of the raised {program.name} is {list(value.shape)}, the model's {list(exact.shape)}")
        rows = (value - exact).abs().amax(-1)
        # In half precision a rounding may send a token to another expert: then most tokens must agree, not all.
        worst = rows.median() if routed and exact.dtype in _HALF else rows.max()
        error = float(worst) / max(1e-30, float(exact.abs().max()))
        if not error <= MODEL_TOLERANCE[exact.dtype]:
            raise UnsupportedModel(
                f"{name} of the raised {program.name} differs from the model by {error:.2e} of the largest value; expected at "
                f"most {MODEL_TOLERANCE[exact.dtype]:.0e}. {FAULT}"
            )


def _draw(type: TensorType, vocab: int, leading: tuple[int, ...], seed: int) -> Tensor:
    """Random values of an input with these leading sizes: ids below ``vocab``, or numbers."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*leading, *(d for d in type.features if isinstance(d, int)))
    if type.dtype in FLOATS:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[type.dtype])
    return torch.randint(0, vocab, shape, generator=generator)


def widen(graph: Graph) -> Graph:
    """The same graph in float64 throughout."""

    def wide(type: TensorType) -> TensorType:
        return type.with_dtype("f64") if type.dtype in FLOATS else type

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op == "input":
            return b.input(v.attr("name"), wide(v.tensor))
        attrs = dict(v.attrs)
        if v.op == "map" and attrs.get("dtype") in FLOATS:
            attrs["dtype"] = "f64"
        if isinstance(attrs.get("type"), KV):
            cache = attrs["type"]
            attrs["type"] = replace(cache, segments=tuple(replace(s, k=Float("f64"), v=Float("f64")) for s in cache.segments))
        if isinstance(attrs.get("results"), TensorType):
            attrs["results"] = wide(attrs["results"])
        return b.add_with(v.op, args, attrs, None)

    return rewrite(graph, rule)


def _named(graph: Graph, values: list[Tensor]) -> dict[str, Tensor]:
    return {graph.names[v]: x for v, x in zip(graph.inputs, values, strict=True)}
