"""Numbers per token that depend on the position alone: expressions that are right at every position, or none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import decoder
from torch import Tensor, nn

import elision
from elision.errors import UnsupportedModel
from elision.frontend.capture import capture
from elision.frontend.normalise import normalise
from elision.frontend.position_number import PositionNumbers
from elision.frontend.taint import Taint
from elision.ir.expr import compiled

LIMIT = 3000


class Positional(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, position_ids: Tensor) -> Tensor:
        return self.function(position_ids)


def number(function: Callable[[Tensor], Tensor]) -> str | None:
    """The expression that is found for a function of the positions ``[B, T]``."""
    captured = capture(Positional(function), example={"position_ids": torch.arange(12).expand(2, 12).contiguous()})
    graph = normalise(captured.graph)
    result = next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]
    return PositionNumbers(captured, Taint(graph, captured.kinds), LIMIT).text(result)


def temperature(p: Tensor) -> Tensor:
    return torch.log1p(torch.floor((p.float() + 1.0) / 300)) * 0.3 + 1.0


def count(p: Tensor) -> Tensor:
    """The tokens of the call, from 0, whatever their positions are."""
    return torch.arange(p.shape[1]).expand(p.shape[0], -1)


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "temperature": temperature,
    "of one row": lambda p: temperature(p[0])[None, :, None],
    "for heads": lambda p: temperature(p)[:, :, None, None],
    "capped": lambda p: (p.float() + 2).clamp(max=700.0).sqrt(),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_expressions_of_the_position(name: str) -> None:
    function, p = NUMBERS[name], torch.tensor([[0, 1, 299, 300, 598, 599, 100_000]])
    text = number(function)
    assert text is not None
    assert torch.equal(compiled(text)(p.float()).flatten(), function(p).flatten())


def test_a_count_of_the_tokens_is_their_position() -> None:
    assert number(lambda p: temperature(count(p))) == number(temperature)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: p.float() / p.shape[1],
        lambda p: p.float() / p.max(),
        lambda p: p.float().cumsum(1),
        lambda p: (p / 4).int().float(),
        lambda p: p.float().flip(1),
        lambda p: p[:, :, None].float() * torch.ones(2),
        lambda p: torch.where(p < 2900, 1.0, 2.0),
        lambda p: p.float()[:, :1].expand(p.shape),
        lambda p: p - count(p) + 1.0,
        lambda p: p,
    ],
    ids=["by length", "by maximum", "sum", "truncated", "reversed", "two numbers", "far step", "first", "difference", "integers"],
)
def test_other_values_are_none(function: Callable[[Tensor], Tensor]) -> None:
    assert number(function) is None


def test_layers_that_differ_in_their_number_alone_are_told() -> None:
    model = decoder("llama4")
    model.model.layers[3].self_attn.floor_scale = 7  # type: ignore[union-attr, index]
    with pytest.raises(UnsupportedModel, match=r"layers 2 and 3 are alike but for a number.*/ 4.*/ 7"):
        elision.compile(model)
