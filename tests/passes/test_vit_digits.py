"""A vision transformer trained here on scikit-learn's digits: what leaving out tokens costs in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, interpolate
from transformers import ViTConfig, ViTForImageClassification

import elision
from elision.ir.interp import Interpreter
from elision.ir.value import Value
from elision.runtime import forward

SIDE, PATCH = 32, 4  # 8 x 8 patches
EPOCHS, BATCH = 30, 64


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[n, 3, 32, 32]`` in random order, and their classes."""
    from sklearn.datasets import load_digits  # of the tests that run nightly alone

    given: Any = load_digits()
    x = torch.tensor(given.images, dtype=torch.float32)[:, None] / 8 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return interpolate(x, (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)[order], torch.tensor(given.target)[order]


@cache
def trained() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=SIDE, patch_size=PATCH, num_labels=10)).train()
    x, y = digits()
    steps = EPOCHS * (1400 // BATCH)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for i in range(steps):
        batch = torch.randint(0, 1400, (BATCH,), generator=torch.Generator().manual_seed(i))
        loss = cross_entropy(model(pixel_values=x[batch]).logits, y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


def accuracy(model: elision.Model) -> float:
    """Of the images that were not trained on, in per cent."""
    x, y = (part[1400:] for part in digits())
    logits = torch.cat([model(pixel_values=part).logits for part in x.split(8)])
    return float((logits.argmax(-1) == y).float().mean() * 100)


def flops(model: elision.Model) -> float:
    """Multiplications and additions of one image, of products and attention as they really run."""
    total = 0.0

    def observe(value: Value, operands: Sequence[Any]) -> None:
        nonlocal total
        if value.op == "linear":
            total += 2 * operands[0].numel() * operands[1].shape[0]
        if value.op == "attend":
            total += 4 * operands[0].numel() * len(operands[0])

    graph = model.program.entries["score"]
    batch = forward.batch(graph, {"pixel_values": digits()[0][:1]})
    Interpreter(model.program, dict(model.weights), observe=observe).run(graph, batch.inputs, batch.axes)
    return total


def compiled(*passes: str, target: str = "cpu") -> elision.Model:
    return elision.compile(trained(), passes=list(passes), target=target, threads=1)


@pytest.mark.nightly
@pytest.mark.parametrize("text", ["tome:n=8", "zero-tprune:keep=0.7,layers=0+2+4"])
def test_a_third_less_work_costs_a_point_at_most(text: str) -> None:
    whole, fewer = compiled(), compiled(text)
    assert flops(compiled(text, target="reference")) <= 0.65 * flops(compiled(target="reference"))
    before, after = accuracy(whole), accuracy(fewer)
    assert before > 93 and after >= before - 1.0, (before, after)


@pytest.mark.nightly
def test_more_tokens_cost_more_accuracy() -> None:
    """The share of images whose class stays falls with the tokens that are left."""
    x = digits()[0][1400:1600]
    want = compiled()(pixel_values=x[:8]).logits
    for texts in (["tome:n=4", "tome:n=10"], [f"zero-tprune:layers=0-5,keep={k}" for k in (0.9, 0.5)]):
        drift = [float((compiled(t)(pixel_values=x[:8]).logits - want).norm()) for t in texts]
        assert drift == sorted(drift) and drift[0] > 0
