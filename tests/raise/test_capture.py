"""Capture: the exported graph is the model, and the user's model stays as it was."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from tiny_models import tiny
from torch import nn

from elision.errors import BadInput, UnsupportedModel
from elision.frontend.attention import reference_attention
from elision.frontend.capture import capture
from elision.frontend.evaluate import evaluate
from elision.frontend.normalise import normalise


def eager_logits(model, ids, positions):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        return twin(input_ids=ids, position_ids=positions, use_cache=False).logits


FAMILIES = {
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": 8},
    "Gemma2Config": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_equals_the_model_bit_for_bit(of, tokens, family):
    case = of(family, **FAMILIES[family])
    ids, positions = tokens
    expected = eager_logits(case.model, ids, positions)
    for captured in (case.raw, case.captured):
        found = captured.run(input_ids=ids, position_ids=positions)
        assert list(found) == ["logits"]
        assert torch.equal(found["logits"], expected)


def test_sinks_reach_the_operator(of, tokens):
    case = of("GptOssConfig", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    assert all(site.args[4] is not None for site in case.attention)
    ids, positions = tokens
    found = case.captured.run(input_ids=ids, position_ids=positions)["logits"]
    torch.testing.assert_close(found, eager_logits(case.model, ids, positions), rtol=0, atol=1e-5)


def test_model_with_own_attention_keeps_it(of, tokens):
    """BLOOM adds its mask to the scores itself: through the registry it would see the future."""
    case = of("BloomConfig", n_layer=3, n_head=4)
    assert case.attention == []
    with torch.no_grad():
        expected = case.model(input_ids=tokens[0], use_cache=False).logits
    found = case.captured.run(input_ids=tokens[0])["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_the_users_model_is_untouched(rope):
    model = tiny("LlamaConfig", rope_parameters={"rope_type": rope, "rope_theta": 1e4, "factor": 2.0}).train()
    model.set_attn_implementation("eager")
    config = copy.deepcopy(model.config.to_dict())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    if rope == "dynamic":  # frequencies that depend on the length need control flow on values
        with pytest.raises(UnsupportedModel, match="cannot be traced"):
            capture(model)
    else:
        capture(model)
    assert model.config._attn_implementation == "eager"
    assert model.config.to_dict() == config
    assert model.training
    assert {name: b for name, b in model.named_buffers()}.keys() == buffers.keys()
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_weights_are_shared_and_tied_ones_appear_once(of):
    case = of("LlamaConfig", tie_word_embeddings=True)
    weights = [name for name in case.captured.params if "embed" in name or "head" in name]
    assert len(weights) == 1
    assert case.captured.params[weights[0]].data_ptr() == case.model.lm_head.weight.data_ptr()
    assert case.captured.kinds["position_ids"] == "position"
    assert case.captured.kinds["input_ids"] == "token"


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)[:, ::2].contiguous()
        y.relu_()
        y[:, 0] += 1.0
        return y + self.linear(x)[:, ::2]


def test_plain_module_is_functional_and_keeps_slices_with_a_step():
    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(4, 6, 8)
    captured = capture(model, example=(x,))
    graph = normalise(captured.graph)
    assert not any(n.op == "call_function" and n.target._schema.is_mutable for n in graph.nodes)
    y = torch.randn(2, 9, 8)
    (found,) = torch.fx.Interpreter(torch.fx.GraphModule(nn.Module(), graph)).run(
        *[captured.params[captured.source[n.name]] if n.name in captured.source else y
          for n in graph.nodes if n.op == "placeholder"]
    )  # fmt: skip
    torch.testing.assert_close(found, model(y))
    assert sum(str(n.target) == "aten.linear.default" for n in graph.nodes) == 1  # common sub-expression


def test_missing_example_and_missing_transformers_are_bad_input(monkeypatch):
    with pytest.raises(BadInput, match="example="):
        capture(InPlace())
    model = tiny("LlamaConfig", num_hidden_layers=1)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.raises(BadInput, match="pip install"):
        capture(model)


def test_evaluate_cuts_the_graph_at_given_values(of):
    case = of("LlamaConfig")
    cos = case.node("aten.cos.default")
    positions = torch.tensor([[5, 6, 7]])
    (table,) = evaluate(case.captured, [cos], positions)
    angle = positions[0].float()[:, None] * case.model.model.rotary_emb.inv_freq
    assert torch.equal(table[0], torch.cat([angle, angle], -1).cos())
    (zero,) = evaluate(case.captured, [cos], positions, given={cos.args[0]: torch.full((1, 3, 16), 0.0)})
    assert torch.equal(zero, torch.ones(1, 3, 16))


def test_taint_tells_masks_and_tables_from_data(of):
    case = of("LlamaConfig")
    q, _, _, mask = case.attention[0].args[:4]
    assert case.taint.position_only(mask)
    assert not case.taint.position_only(q)
    assert case.taint.token(q)
    assert case.taint[case.node("aten.cos.default")] == {"position"}


def test_reference_attention_flags_equal_the_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 6)
    i, j = torch.arange(9)[:, None], torch.arange(9)
    mask = ((j <= i) & (i - j < 4))[None, None]
    by_mask = reference_attention(q, k, v, mask, None, 0.3, 5.0, 0, False)
    by_flags = reference_attention(q, k, v, None, None, 0.3, 5.0, 4, True)
    assert by_mask.shape == (2, 9, 4, 6)
    assert torch.equal(by_mask, by_flags)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(reference_attention(q, k, v, additive, None, 0.3, 5.0, 0, False), by_mask)
