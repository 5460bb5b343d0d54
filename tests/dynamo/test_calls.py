"""Which graphs are a module's forward: what only looks like it on the first call runs as it was captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from compiled import close, decoder, graphs, ids, twice
from torch import nn

from elision.backend import elision as backend


def test_a_function_around_a_model_is_not_taken_for_the_model() -> None:
    """On their first call both give what the model gives."""
    model, given = decoder(), ids(2, 9).clamp(8, 50)
    other = given.clone()
    other[0, 3], other[1, 4] = 7, 90

    def masked(input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids, use_cache=False).logits.masked_fill((input_ids == 7)[..., None], -1e9)

    def clamped(input_ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids.clamp(max=50), use_cache=False).logits

    for function in (masked, clamped):
        compiled = torch.compile(function, backend=backend)
        with torch.no_grad():
            assert close(compiled(given), function(given)) and close(compiled(other), function(other))
    assert all("which is not the forward" in g.reason for g in graphs()) and len(graphs()) == 2


def test_a_forward_that_torch_decorates_is_a_forward() -> None:
    class Ungraded(transformers.LlamaForCausalLM):
        @torch.no_grad()
        def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **rest: Any) -> Any:
            scale = rest.pop("scale", 1)
            found = super().forward(input_ids, attention_mask, position_ids, **rest)
            found.logits = found.logits * scale
            return found

    model, given = Ungraded(decoder().config).eval(), ids(2, 9)
    compiled = torch.compile(model, backend=backend)
    for more in ({}, {"scale": 2}):
        assert close(twice(compiled, given, use_cache=False, **more).logits, model(given, use_cache=False, **more).logits)
    assert [g.runs for g in graphs()] == ["native", "eager"] and "scale=2 is no tensor" in graphs()[1].reason


def test_the_beginning_of_a_forward_is_not_taken_for_all_of_it() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), 2.0))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = x * self.weight
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break()
            return x, x.clamp(max=9)

    model = Ends().eval()
    with torch.no_grad():
        found, want = twice(torch.compile(model, backend=backend), torch.full((2, 8), 3.0)), model(torch.full((2, 8), 3.0))
    assert torch.equal(found[1], want[1]) and "breaks before the forward" in graphs()[0].reason


def test_arguments_that_are_no_tensors_are_not_taken_for_their_defaults() -> None:
    class Banning(transformers.LlamaForCausalLM):
        def forward(
            self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, ban: int | None = None, **rest: Any
        ) -> Any:
            found = super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest)
            if ban is not None:
                found.logits = found.logits.masked_fill((input_ids == ban)[..., None], -1e9)
            return found

    model, given = Banning(decoder().config).eval(), ids(2, 9).clamp(min=8)
    other = given.clone()
    other[0, 3] = 7
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for ban in (7, None):
            compiled(given, ban=ban, use_cache=False)
            assert close(compiled(other, ban=ban, use_cache=False).logits, model(other, ban=ban, use_cache=False).logits)
    assert [g.runs for g in graphs()] == ["eager", "native"] and "ban=7 is no tensor" in graphs()[0].reason


def test_numbers_that_vary_are_not_taken_for_constants() -> None:
    """Its first call keeps all logits, as the program does; the same graph keeps three of them later."""
    model, given = decoder(), ids(2, 11)
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for kept in (11, 3):
            found = compiled(given, logits_to_keep=kept, use_cache=False).logits
            assert close(found, model(given, logits_to_keep=kept, use_cache=False).logits)
    assert "a number that varies" in graphs()[0].reason


class Odd(nn.Module):
    """Its forward takes a tensor without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, scale: Any) -> torch.Tensor:
        return self.linear(x) * scale


class Bare(transformers.LlamaForCausalLM):
    """Its forward names nothing that it returns."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (lambda: Odd(), (torch.ones(2, 4, 8), torch.tensor(2.0))),
        (lambda: Odd(), (torch.ones(2, 4, 8), 2.5)),
        (lambda: Bare(decoder().config), (ids(2, 9),)),
    ],
)
def test_what_fails_on_the_way_runs_as_captured(model: Any, args: Any) -> None:
    model = model().eval()
    with torch.no_grad():
        want = model(*args)
    assert close(twice(torch.compile(model, backend=backend), *args), want)
    assert graphs()[0].runs == "eager" and graphs()[0].reason


def test_any_error_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("of the frontend")

    monkeypatch.setattr("elision.dynamo.forward.capture", fails)
    model = decoder()
    with torch.no_grad():
        want = model(ids(2, 9)).logits
    assert close(twice(torch.compile(model, backend=backend), ids(2, 9), use_cache=False).logits, want)
    assert graphs()[0].runs == "eager" and graphs()[0].reason.endswith("of the frontend")
