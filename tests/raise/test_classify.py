"""Masks and rotation tables are recognised by their values, and only when every value fits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from elision.frontend.bias import Bias, classify_bias
from elision.frontend.capture import Captured, capture
from elision.frontend.classify import Mask, RopeTable, classify_mask, classify_rope, rope_tables


class Positional(nn.Module):
    """A module whose outputs are functions of the positions alone."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, position_ids: Tensor) -> tuple[Tensor, ...]:
        return self.function(position_ids)


def captured(function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Captured, list[torch.fx.Node]]:
    result = capture(
        Positional(function), example={"position_ids": torch.arange(12).expand(2, 12).contiguous()}
    )
    output = next(n for n in result.graph.nodes if n.op == "output")
    return result, list(output.args[0])


def classify(rule: Callable[[Tensor, Tensor], Tensor]) -> Mask | None:
    result, (node,) = captured(lambda p: (rule(p[:, None, :, None], p[:, None, None, :]),))
    return classify_mask(result, node, limit=4096)


LAST = torch.finfo(torch.float32).min
MASKS = {
    "full": (lambda i, j: (i >= 0) & (j >= 0), Mask("full")),
    "causal": (lambda i, j: j <= i, Mask("causal")),
    "additive": (lambda i, j: torch.where(j <= i, 0.0, LAST), Mask("causal")),
    "window": (lambda i, j: (j <= i) & (j > i - 6), Mask("window", 6)),
    "wide window": (lambda i, j: (j <= i) & (j > i - 150), Mask("window", 150)),
    "chunk": (lambda i, j: (j <= i) & (j // 5 == i // 5), Mask("chunk", 5)),
    "future": (lambda i, j: j <= i + 1, None),
    "one hole": (lambda i, j: (j <= i) & ~((i == 9) & (j == 3)), None),
    "far hole": (lambda i, j: (j <= i) & ~((i == 150) & (j == 3)), None),
    "alibi": (lambda i, j: torch.where(j <= i, 0.1 * (j - i), LAST), None),
    "by position": (lambda i, j: (j <= i) & (j >= 3), None),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask(name):
    rule, expected = MASKS[name]
    assert classify(rule) == expected


def test_masks_of_models(of):
    window = of("MistralConfig", sliding_window=8)
    llama = of("LlamaConfig")
    gemma = of("Gemma2Config", head_dim=16, sliding_window=8, query_pre_attn_scalar=16)
    masks = {
        c: [classify_mask(c.captured, s.args[3], limit=64) for s in c.attention]
        for c in (window, llama, gemma)
    }
    assert masks[window] == [Mask("window", 8)] * 3
    assert masks[llama] == [Mask("causal")] * 3
    assert masks[gemma] == [Mask("window", 8), Mask("causal"), Mask("window", 8)]


def bias(rule: Callable[[Tensor, Tensor], Tensor], limit: int = 300) -> Bias | None:
    """Of a rule of ``i [B, 1, T, 1]`` and ``j [B, 1, 1, T]``."""
    result, (node,) = captured(lambda p: (rule(p[:, None, :, None], p[:, None, None, :]),))
    return classify_bias(result, node, limit=limit)


SLOPES = torch.tensor([0.91, 0.3, -0.05, 2.0**-7])
STEPS = SLOPES[:, None, None]
ALIBI = {
    "by key": lambda i, j: torch.where(j <= i, STEPS * j, LAST),
    "by distance": lambda i, j: torch.where(j <= i, STEPS * (j - i), LAST),
    "from the end": lambda i, j: torch.where(j <= i, STEPS * (j - j.amax()), LAST),
    "window": lambda i, j: torch.where((j <= i) & (j > i - 6), STEPS * j, LAST),
    "shifted rows": lambda i, j: torch.where(j <= i, STEPS * j + i * 0.5, -1e9),
    "double": lambda i, j: torch.where(j <= i, STEPS.double() * j, -torch.inf),
}
OTHER = {
    "bent": lambda i, j: torch.where(j <= i, STEPS * (j - i).clamp(min=-200), LAST),
    "square": lambda i, j: torch.where(j <= i, STEPS * (j - i) ** 2, LAST),
    "symmetric": lambda i, j: -STEPS.abs() * (j - i).abs(),
    "rounded": lambda i, j: torch.where(j <= i, (STEPS.bfloat16() * j).float(), LAST),
    "by head": lambda i, j: torch.where(j <= i - torch.arange(4)[:, None, None], STEPS * j, LAST),
}


@pytest.mark.parametrize("name", ALIBI)
def test_alibi(name):
    found = bias(ALIBI[name])
    assert found is not None and found.mask == (Mask("window", 6) if name == "window" else Mask("causal"))
    torch.testing.assert_close(found.slopes, SLOPES.to(found.slopes.dtype), rtol=3e-7, atol=0)
    if name != "shifted rows":  # there, every step is rounded
        assert torch.equal(found.slopes.float(), SLOPES)
    torch.testing.assert_close(found.exact, SLOPES.double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OTHER)
def test_another_bias_is_refused(name):
    assert bias(OTHER[name]) is None


@given(
    st.sampled_from(["causal", "window", "chunk"]), st.integers(1, 9), st.integers(0, 60), st.integers(0, 60)
)
def test_predicates_are_what_they_say(kind, size, i, j):
    allowed = bool(Mask(kind, size).allows(torch.tensor(i), torch.tensor(j)))
    low = {"causal": 0, "window": i - size + 1, "chunk": i - i % size}[kind]
    assert allowed == (low <= j <= i)


ROPE = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_rope_of_models_is_their_own_buffer(of, kind):
    case = of("LlamaConfig", rope_parameters=ROPE[kind])
    cos, sin = (n for n in case.captured.graph.nodes if case.taint.position_only(n) and is_table(n))
    found = classify_rope(case.captured, cos, sin, limit=64)
    rotary = case.model.model.rotary_emb
    assert found is not None and found.exact and found.style == "half"
    assert torch.equal(found.inv_freq, rotary.inv_freq)
    assert found.scale == pytest.approx(rotary.attention_scaling, abs=0)


def is_table(node: torch.fx.Node) -> bool:
    names = [str(n.target) for n in (node, *node.all_input_nodes)]
    return names in (["aten.mul.Tensor", "aten.cos.default"], ["aten.mul.Tensor", "aten.sin.default"])


INV_FREQ = 1e4 ** (-torch.arange(0, 16, 2) / 16)


def table_of(angle: Callable[[Tensor], Tensor], scale: float = 1.0) -> RopeTable | None:
    result, (cos, sin) = captured(lambda p: (angle(p).cos() * scale, angle(p).sin() * scale))
    return classify_rope(result, cos, sin, limit=2048)


def test_rope_is_fitted_where_the_model_keeps_only_a_table():
    angles = torch.arange(2048).double()[:, None] * INV_FREQ.double()
    cos, sin = angles.cos().float(), angles.sin().float()
    result, nodes = captured(
        lambda p: (cos[p].repeat_interleave(2, -1) * 1.5, sin[p].repeat_interleave(2, -1) * 1.5)
    )
    found = classify_rope(result, *nodes, limit=2048)
    assert found is not None and not found.exact
    assert (found.style, found.scale) == ("interleaved", 1.5)
    torch.testing.assert_close(found.inv_freq, INV_FREQ.double(), rtol=1e-6, atol=1e-9)


def test_rope_layout_single_and_bfloat16():
    found = table_of(lambda p: p[..., None].float() * INV_FREQ)
    assert found is not None and (found.style, found.exact) == ("single", True)
    result, nodes = captured(lambda p: tuple(
        (f(p[..., None].float() * INV_FREQ) * 1.1386).bfloat16() for f in (torch.cos, torch.sin)
    ))  # fmt: skip
    found = classify_rope(result, *nodes, limit=2048)
    assert found is not None and found.exact and found.scale == 1.1386


def test_rope_of_a_complex_table():
    def turns(p: Tensor, scale: float = 1.0) -> Tensor:
        angle = p[..., None].float() * INV_FREQ
        return (torch.polar(torch.ones_like(angle), angle) * scale)[:, :, None, :]

    for scale in (1.0, 1.5):
        result, (table,) = captured(lambda p, scale=scale: (turns(p, scale),))
        found = classify_rope(result, table, table, limit=2048)
        assert found is not None and found.exact and (found.style, found.scale) == ("single", scale)
        assert torch.equal(found.inv_freq, INV_FREQ)
    result, (table,) = captured(lambda p: (turns(p) * p[..., None, None],))
    assert classify_rope(result, table, table, limit=2048) is None


def test_tables_that_are_no_plain_rotation_are_refused():
    def by_length(p: Tensor) -> Tensor:  # dynamic scaling, as a value
        return p[..., None].float() * torch.where(p.max() > 512, INV_FREQ / 2, INV_FREQ)

    assert table_of(by_length) is None
    assert table_of(lambda p: (p[..., None].float() + 1) * INV_FREQ) is None
    assert table_of(lambda p: p[..., None].float().clamp(max=700) * INV_FREQ) is None


def test_rope_tables_layouts():
    positions = torch.tensor([0, 3])
    for style, first in (("half", [1.0, 2.0, 1.0, 2.0]), ("interleaved", [1.0, 1.0, 2.0, 2.0])):
        cos, sin = rope_tables(RopeTable(torch.tensor([1.0, 2.0]), 0.5, style, True), positions)
        assert torch.equal(cos, 0.5 * (positions[:, None] * torch.tensor(first)).cos())
        assert torch.equal(sin, 0.5 * (positions[:, None] * torch.tensor(first)).sin())
