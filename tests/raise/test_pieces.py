"""A value that is written piece by piece is a concatenation; one that is not written throughout, or twice, stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from elision.frontend.capture import capture
from elision.frontend.normalise import normalise
from elision.frontend.token_major import Layout


class Written(nn.Module):
    """Writes ``x`` and twice ``x`` between these bounds of the last axis of a value of 8 channels."""

    def __init__(self, *bounds: tuple[int, int], step: int = 1, axis: int = -1) -> None:
        super().__init__()
        self.bounds, self.step, self.axis = bounds, step, axis

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ones(x.shape[0], 8, 8)
        for i, (start, stop) in enumerate(self.bounds):
            place = (..., slice(start, stop, self.step)) if self.axis == -1 else (slice(None), slice(start, stop, self.step))
            y[place] = (i + 1) * (x[..., : len(range(start, stop, self.step))] if self.axis == -1 else x[:, : stop - start])
        return y


def graph_of(model: nn.Module) -> fx.Graph:
    captured = capture(model, example=(torch.randn(3, 8, 8),))
    graph = normalise(captured.graph)
    x = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(0))
    (found,) = fx.Interpreter(fx.GraphModule(nn.Module(), graph)).run(x)
    assert torch.equal(found, model(x))
    return graph


def operators(graph: fx.Graph) -> set[str]:
    return {str(n.target).split(".")[1] for n in graph.nodes if n.op == "call_function" and "aten" in str(n.target)}


@pytest.mark.parametrize(
    "model",
    [
        Written((0, 3), (3, 8)),
        Written((3, 8), (0, 3)),
        Written((2, 5), (5, 8), (0, 2)),
        Written((0, 5), (5, 8), axis=1),
        Written((0, 8)),
    ],
    ids=["in order", "backwards", "three", "another axis", "all at once"],
)
def test_pieces_of_the_whole_are_joined(model: nn.Module) -> None:
    assert not operators(graph_of(model)) & {"slice_scatter", "copy", "ones", "copy_"}


@pytest.mark.parametrize(
    "model",
    [Written((0, 3), (4, 8)), Written((0, 5), (3, 8)), Written((0, 3), (3, 7)), Written((0, 8), (2, 4)), Written((0, 8), step=2)],
    ids=["a gap", "twice", "an end", "written over", "a step"],
)
def test_others_are_not(model: nn.Module) -> None:
    assert "slice_scatter" in operators(graph_of(model))


class Casts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], 8, 8, dtype=torch.float64)
        y[..., :4].copy_(x[..., :4])
        y[..., 4:].copy_(x[..., :1])
        return y


def test_a_copy_that_casts_or_broadcasts_does_something() -> None:
    assert "copy" in operators(graph_of(Casts()))


def test_axes_of_size_one_may_come_before_the_length() -> None:
    assert Layout(0, 2, (1, 8)).flat and Layout(0, 1, (4, 8)).flat and Layout(1, 3, (1, 1, 8)).flat and Layout(0, 0, (8,)).flat
    assert not Layout(0, 2, (4, 8)).flat and not Layout(1, 0, (8,)).flat and not Layout(1, 1, (4, 8)).flat
