"""Structure: the stream, its blocks, their templates and layers, for families that differ in their blocks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elision.errors import UnsupportedModel
from elision.frontend.capture import capture
from elision.frontend.evaluate import evaluate
from elision.frontend.normalise import normalise
from elision.frontend.structure import find_structure
from elision.frontend.taint import Taint

SEQUENTIAL = {
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": 8},
    "Qwen3Config": {"head_dim": 16},
    "Gemma2Config": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "GPT2Config": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "Phi3Config": {"pad_token_id": 0},
    "Olmo2Config": {},
}
OPT = dict(ffn_dim=96, word_embed_proj_dim=32, num_key_value_heads=4)


def shape(structure):
    return [(s.kind, s.template, s.layer) for s in structure.segments]


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_layers_are_attention_and_mlp_of_two_templates(of, family):
    found = of(family, **SEQUENTIAL[family]).structure
    assert shape(found) == [(kind, t, i) for i in range(3) for t, kind in enumerate(("attn", "mlp"))]
    assert found.layers == 3 and found.templates == 2
    assert [s.start for s in found.segments] == list(found.stream[:-1])
    assert [s.end for s in found.segments] == list(found.stream[1:])


@pytest.mark.parametrize("family", ["GPTNeoXConfig", "CohereConfig"])
def test_parallel_residual_has_one_block_per_layer(of, family):
    assert shape(of(family).structure) == [("both", 0, i) for i in range(3)]


@pytest.mark.parametrize("before", [True, False])
def test_post_norm_blocks_end_in_their_norm(of, before):
    found = of("OPTConfig", **OPT, do_layer_norm_before=before).structure
    assert shape(found) == [(kind, t, i) for i in range(3) for t, kind in enumerate(("attn", "mlp"))]
    tails = [[str(node.target) for node in s.nodes[-2:]] for s in found.segments]  # a reshape may follow
    assert all(("aten.layer_norm.default" in tail) is (not before) for tail in tails)


def test_llama_is_embedding_then_blocks_then_norm_and_head(of):
    case = of("LlamaConfig")
    found = case.structure
    order = list(case.captured.graph.nodes)
    data = [n for n in order if case.taint.token(n) and n.op == "call_function"]
    assert data[0] is found.root and "embedding" in str(found.root.target)
    covered = [n for s in found.segments for n in s.nodes]
    assert len(covered) == len(set(covered))
    epilogue = data[1 + len(covered) :]
    assert covered == data[1 : 1 + len(covered)]
    dense = [n for n in epilogue if "linear" in str(n.target)]
    assert dense == [found.result]
    assert any("rsqrt" in str(n.target) for n in epilogue)


def test_slots_of_one_template_correspond(of):
    case = of("LlamaConfig")
    blocks = [s for s in case.structure.segments if s.kind == "attn"]
    names = [[case.captured.source[p.name].split(".", 3)[3] for p in s.params] for s in blocks]
    assert names[0] == names[1] == names[2] and len(names[0]) == 5
    owners = [{case.captured.source[p.name].split(".")[2] for p in s.params} for s in blocks]
    assert owners == [{"0"}, {"1"}, {"2"}]


def test_layers_of_one_template_may_differ_by_their_mask(of):
    case = of("Gemma2Config", **SEQUENTIAL["Gemma2Config"])
    local, world, again = (s for s in case.structure.segments if s.kind == "attn")
    assert local.template == world.template
    assert local.externals == again.externals
    assert local.externals != world.externals


def test_a_first_dense_layer_has_its_own_template(of):
    case = of("Qwen3MoeConfig", head_dim=16, num_experts=4, num_experts_per_tok=2,
              moe_intermediate_size=32, mlp_only_layers=[0])  # fmt: skip
    assert shape(case.structure) == [
        ("attn", 0, 0), ("mlp", 1, 0), ("attn", 0, 1), ("mlp", 2, 1), ("attn", 0, 2), ("mlp", 2, 2),
    ]  # fmt: skip


def test_a_block_is_a_function_of_its_start(of):
    """Bypassing layer 1 in the graph equals the model without that layer."""
    case = of("LlamaConfig")
    ids = torch.arange(3, 20)[None]
    positions = torch.arange(17)[None]
    token = next(n for n in case.captured.graph.nodes if n.name == "input_ids")
    stream, result = case.structure.stream, case.structure.result
    (h2,) = evaluate(case.captured, [stream[2]], positions, given={token: ids})
    (skipped,) = evaluate(case.captured, [result], positions, given={token: ids, stream[4]: h2})
    popped = torch.nn.ModuleList([layer for i, layer in enumerate(case.model.model.layers) if i != 1])
    kept = case.model.model.layers
    case.model.model.layers = popped
    case.model.config.num_hidden_layers = 2
    try:
        with torch.no_grad():
            expected = case.model(input_ids=ids, use_cache=False).logits
    finally:
        case.model.model.layers = kept
        case.model.config.num_hidden_layers = 3
    torch.testing.assert_close(skipped, expected, rtol=0, atol=1e-5)


class Residual(nn.Module):
    """Blocks without attention, their names and their number unlike any library's."""

    def __init__(self, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.stem = nn.Linear(6, 8)
        self.zz = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU()) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.zz:
            x = x + block(x) if self.residual else block(x)
        return x


def test_plain_residual_network_and_one_without_residuals():
    torch.manual_seed(0)
    example = (torch.randn(3, 5, 6),)
    captured = capture(Residual(True), example=example)
    graph = normalise(captured.graph)
    found = find_structure(graph, Taint(graph, captured.kinds))
    assert shape(found) == [("other", 0, None)] * 4
    captured = capture(Residual(False), example=example)
    with pytest.raises(UnsupportedModel, match="residual"):
        find_structure(captured.graph, Taint(captured.graph, captured.kinds))


class Perceiver(nn.Module):
    """Learned queries look at the tokens: nothing flows from the tokens to the result but keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.query = nn.Embedding(64, 16), nn.Linear(16, 64), nn.Parameter(torch.randn(1, 1, 1, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)[:, None]
        q = self.query.expand(ids.shape[0], 1, ids.shape[1], 16)
        return self.head(nn.functional.scaled_dot_product_attention(q, x, x)[:, 0])


def test_a_result_that_only_attention_s_keys_reach_has_no_stream():
    with pytest.raises(UnsupportedModel, match="keys and values of attention only"):
        captured = capture(Perceiver().eval())
        graph = normalise(captured.graph)
        find_structure(graph, Taint(graph, captured.kinds))
