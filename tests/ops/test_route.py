"""Routing with biases and over groups of experts, against loops over single tokens and against transformers' routers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tests.ops.harness import T, Weight, apply, f32, randn, refused


def by_hand(
    logits: list[float], bias: list[float], *, k: int, kind: str, renormalise: bool, eps: float, scale: float, groups: int,
    top_groups: int, group_best: int,
) -> dict[int, float]:  # fmt: skip
    """Expert to weight of one token."""
    if kind == "softmax":
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    wanted = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // groups
    runs = [range(g * size, (g + 1) * size) for g in range(groups)]
    worth = [sum(sorted((wanted[e] for e in run), reverse=True)[:group_best]) for run in runs]
    open_groups = sorted(range(groups), key=lambda g: -worth[g])[:top_groups]
    allowed = [e for g in open_groups for e in runs[g]]
    chosen = sorted(allowed, key=lambda e: -wanted[e])[:k]
    total = sum(scores[e] for e in chosen) + eps if renormalise else 1.0
    return {e: scores[e] / total * scale for e in chosen}


@given(st.data())
def test_route_equals_one_token_after_the_other(data: Any) -> None:
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    top_groups = data.draw(st.integers(1, groups))
    attrs = dict(
        k=data.draw(st.integers(1, top_groups * size)),
        kind=data.draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalise=data.draw(st.booleans()),
        eps=data.draw(st.sampled_from([0.0, 0.5])),
        scale=data.draw(st.sampled_from([1.0, 2.5])),
        groups=groups,
        top_groups=top_groups,
        group_best=data.draw(st.integers(1, size)),
    )
    logits = randn(5, groups * size, seed=data.draw(st.integers(0, 99)), dtype=torch.float64)
    # Wide biases, also negative ones, which zeros in place of the experts left out would beat.
    bias = randn(groups * size, seed=1, dtype=torch.float64)
    biased = data.draw(st.booleans())
    weight, index = apply("route", logits, *([Weight(bias)] if biased else []), **attrs)
    for row, gates, places in zip(logits.tolist(), weight.tolist(), index.tolist(), strict=True):
        want = by_hand(row, bias.tolist() if biased else [0.0] * len(row), **attrs)
        assert list(want) == places
        assert gates == pytest.approx(list(want.values()), rel=1e-12)


def assert_same(found: Any, weight: torch.Tensor, index: torch.Tensor) -> None:
    """Equal up to the order of the experts."""
    (ours, places), (theirs, order) = found[1].sort(-1), index.sort(-1)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(found[0].gather(-1, places), weight.gather(-1, order), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [True, False])
def test_route_is_that_of_deepseek_v3(norm: bool) -> None:
    config = SimpleNamespace(
        num_experts_per_tok=3, num_local_experts=12, hidden_size=16, routed_scaling_factor=2.5, n_group=4, topk_group=2,
        norm_topk_prob=norm,
    )  # fmt: skip
    router: Any = DeepseekV3TopkRouter(config)
    x, w, bias = randn(40, 16), randn(12, 16, seed=1), randn(12, seed=2)
    with torch.no_grad():
        router.weight.copy_(w)
        router.e_score_correction_bias.copy_(bias)
        _, weight, index = router(x)
    attrs = dict(k=3, kind="sigmoid", renormalise=norm, eps=1e-20, scale=2.5, groups=4, top_groups=2, group_best=2)
    assert_same(apply("route", F.linear(x, w), Weight(bias), **attrs), weight, index)


def test_route_is_that_of_deepseek_v2() -> None:
    config = SimpleNamespace(
        num_experts_per_tok=3, num_experts=12, hidden_size=16, routed_scaling_factor=16.0, n_group=4, topk_group=2,
        topk_method="group_limited_greedy",
    )  # fmt: skip
    router: Any = DeepseekV2TopkRouter(config)
    x, w = randn(40, 16), randn(12, 16, seed=1)
    with torch.no_grad():
        router.weight.copy_(w)
        _, weight, index = router(x)
    found = apply("route", F.linear(x, w), k=3, renormalise=False, scale=16.0, groups=4, top_groups=2)
    assert_same(found, weight, index)


def test_sums_that_vanish_need_eps() -> None:
    small = torch.full((1, 4), -200.0)
    assert apply("route", small, k=2, kind="sigmoid", eps=1e-20)[0].tolist() == [[0.0, 0.0]]
    assert apply("route", small, k=2, kind="sigmoid")[0].isnan().all()


def test_types_of_routing() -> None:
    logits = f32(T, 12)
    refused("12 experts cannot be cut into 5 groups", "route", logits, k=2, groups=5)
    refused("top_groups=4 of 3 groups", "route", logits, k=2, groups=3, top_groups=4)
    refused("group_best=5 of the 4 experts of a group", "route", logits, k=2, groups=3, group_best=5)
    refused("k=5 experts from 1 groups of 4", "route", logits, k=5, groups=3)
    refused(r"expected at most one bias \[12\]", "route", logits, f32(11), k=2)
    refused(r"expected at most one bias \[12\]", "route", logits, f32(12), f32(12), k=2)
    refused(r"expected logits \[t, experts\]", "route", f32(T, 2, 6), k=2)
