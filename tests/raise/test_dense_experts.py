"""Experts spelled densely: raised as experts of a few tokens each, wherever their scores weight; near misses are told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elision
from elision.errors import ElisionError

WIDTH, EXPERTS, K = 16, 4, 2
Gate = Callable[[Tensor], Tensor]


def spread(weight: Tensor, index: Tensor, logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, index, weight)


def softmax_of_all(logits: Tensor) -> Tensor:
    return spread(*logits.softmax(-1).topk(K, -1), logits)


def softmax_of_chosen(logits: Tensor) -> Tensor:
    weight, index = logits.topk(K, -1)
    return spread(weight.softmax(-1), index, logits)


def sigmoid_of_chosen(logits: Tensor) -> Tensor:
    weight, index = logits.topk(K, -1)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, weight).sigmoid()


def smallest(logits: Tensor) -> Tensor:
    return softmax_of_all(-logits)


class Mixture(nn.Module):
    """Attention and a mixture of experts whose scores ``gate(logits) [N, experts]`` weight inputs or outputs."""

    def __init__(self, gate: Gate, inputs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.inputs = gate, inputs
        self.words, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50, bias=False)
        self.qkv, self.router = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 10) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, 5, WIDTH) / 2)

    def mixture(self, x: Tensor) -> Tensor:
        scores = self.gate(self.router(x))
        dense = x.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH)
        if self.inputs:
            dense = dense * scores.T[:, :, None]
        a, b = torch.bmm(dense, self.up).chunk(2, dim=-1)
        out = torch.bmm(F.silu(a) * b, self.down)
        return (out if self.inputs else out * scores.T[:, :, None]).sum(0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (p.view(*p.shape[:2], 2, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        return self.head(x + self.mixture(x.reshape(-1, WIDTH)).view(x.shape))


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize(
    ("gate", "routing"),
    [
        (softmax_of_all, {"k": K, "kind": "softmax", "renormalise": False}),
        (smallest, {"k": K, "kind": "softmax", "renormalise": False}),
        (softmax_of_chosen, {"k": K, "kind": "softmax", "renormalise": True}),
        (sigmoid_of_chosen, {"k": K, "kind": "sigmoid", "renormalise": False}),
    ],
)
def test_dense_experts_are_raised(gate: Gate, routing: dict[str, object], inputs: bool) -> None:
    source = Mixture(gate, inputs).double().eval()
    model = elision.compile(source)
    assert set(model.coverage["entries"].values()) == {0}
    found = {v.op: dict(v.attrs) for g in model.program.targets.values() for v in g.values}
    assert {k: found["route"][k] for k in routing} == routing
    assert found["experts"].get("weighted", "output") == ("input" if inputs else "output")
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = source(ids)
    assert float((model(ids)[0] - want).abs().max()) <= 1e-9 * float(want.abs().max())


def squared(logits: Tensor) -> Tensor:
    return softmax_of_all(logits) ** 2


@pytest.mark.parametrize(("gate", "operator"), [(squared, "softmax"), (torch.tanh, "repeat")])
def test_other_scores_are_told(gate: Gate, operator: str) -> None:
    with pytest.raises(ElisionError, match=f"cannot be raised: operator aten.{operator}"):
        elision.compile(Mixture(gate, inputs=True).eval())
