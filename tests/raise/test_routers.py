"""Routers: their numbers are read off the graph, and what is not quite `route` is not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from families import BASE, GROUPS, LATENT
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3

import elision
from elision.frontend.anchors import close
from elision.frontend.capture import capture
from elision.frontend.normalise import normalise
from elision.frontend.routers import Router, RouterFinder
from elision.frontend.taint import Taint
from elision.frontend.token_major import Layouts

EXPERTS = 12


class Routed(nn.Module):
    """Token ids to the weights and indices of two of twelve experts; the defaults are DeepSeek-V3's."""

    def __init__(
        self,
        masked: float = -torch.inf,
        best: int = 2,
        groups: int = 2,
        open_groups: int = 1,
        factor: float = 2.5,
        eps: float = 1e-20,
        score: Callable[[Tensor], Tensor] = torch.sigmoid,
        bias_in: str = "choice",
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.gate = nn.Embedding(32, 16), nn.Linear(16, EXPERTS, bias=False)
        self.register_buffer("bias", torch.randn(EXPERTS))
        self.masked, self.best, self.groups, self.open_groups = masked, best, groups, open_groups
        self.factor, self.eps, self.score, self.bias_in = factor, eps, score, bias_in

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(self.gate(self.embed(ids)).flatten(0, 1))
        choice = scores + self.bias
        if self.groups > 1:
            parts = choice.view(-1, self.groups, EXPERTS // self.groups)
            worth = parts.topk(self.best, -1)[0].sum(-1) if self.best > 1 else parts.amax(-1)
            kept = torch.zeros_like(worth).scatter(1, worth.topk(self.open_groups, -1)[1], 1).bool()
            choice = parts.masked_fill(~kept[..., None], self.masked).flatten(1)
        index = choice.topk(2, -1, sorted=False)[1]
        weight = (scores + self.bias if self.bias_in == "weights" else scores).gather(1, index)
        return weight / (weight.sum(-1, keepdim=True) + self.eps) * self.factor, index


def router(module: nn.Module) -> Router | None:
    captured = capture(module)
    captured = replace(captured, graph=normalise(captured.graph))
    graph, taint = captured.graph, Taint(captured.graph, captured.kinds)
    weight, index = next(n for n in graph.nodes if n.op == "output").args[0]
    inside = {n for n in graph.nodes if taint.token(n) and n.op == "call_function"}
    return RouterFinder(captured, taint, Layouts(graph, captured.inputs), close).find(weight, index, inside)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, {}),
        ({"best": 3}, {"group_best": 3}),
        ({"best": 1, "eps": 0.25}, {"group_best": 1, "eps": 0.25}),
        ({"groups": 4, "open_groups": 3, "factor": 1.5}, {"groups": 4, "top_groups": 3, "scale": 1.5}),
        ({"groups": 1, "eps": 0.0}, {"groups": None, "top_groups": None, "group_best": None, "eps": None}),
        ({"score": torch.nn.Softmax(-1), "eps": 0.0}, {"kind": "softmax", "eps": None}),
    ],
    ids=str,
)
def test_numbers_are_read_off_the_graph(given: dict[str, Any], says: dict[str, Any]) -> None:
    usual = dict(k=2, kind="sigmoid", renormalise=True, eps=1e-20, scale=2.5, groups=2, top_groups=1, group_best=2)
    found = router(Routed(**given))
    assert found is not None and len(found.bias) == 1
    assert found.attrs == {k: v for k, v in {**usual, **says}.items() if v is not None}


@pytest.mark.parametrize(
    "given",
    [{"masked": 0.0}, {"bias_in": "weights"}, {"score": lambda x: x.sigmoid() ** 2}, {"score": torch.tanh}],
    ids=["zeros where groups are left out", "bias in the weights", "squares", "another curve"],
)
def test_what_is_not_route_is_not_taken_for_it(given: dict[str, Any]) -> None:
    assert router(Routed(**given)) is None


def test_an_expression_of_a_buffer_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values = {**BASE, **LATENT, **GROUPS, "num_hidden_layers": 2, "first_k_dense_replace": 0}
    model = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**values)).eval()
    for p in (*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)):
        p.data.add_(torch.randn(p.shape) * 0.3)
    usual = modeling_deepseek_v3.DeepseekV3TopkRouter.forward

    def halved(self: Any, x: Tensor) -> Any:
        before = self.e_score_correction_bias
        self.e_score_correction_bias = before.tanh()
        try:
            return usual(self, x)
        finally:
            self.e_score_correction_bias = before

    monkeypatch.setattr(modeling_deepseek_v3.DeepseekV3TopkRouter, "forward", halved)
    compiled = elision.compile(model, target="reference")
    ids = torch.randint(0, 128, (2, 30), generator=torch.Generator().manual_seed(1))
    assert sum(name.endswith(".tanh") for name in compiled.weights) == 2
    with torch.no_grad():
        want = model(ids).logits
    assert float((compiled(ids).logits - want).abs().max()) <= 1e-5 * float(want.abs().max())
