"""Dense ops against torch and against transformers' modules: bitwise where both compute in the same order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from elision.ir.tokens import Tokens
from elision.ir.types import Axis
from tests.ops.harness import T, Weight, apply, f32, i64, randn, refused

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
U = Axis("u")


# --- products ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear(dtype: torch.dtype) -> None:
    x, w, b = randn(5, 8, dtype=dtype), randn(6, 8, seed=1, dtype=dtype), randn(6, seed=2, dtype=dtype)
    assert torch.equal(apply("linear", x, Weight(w)), F.linear(x, w))
    assert torch.equal(apply("linear", x, Weight(w), Weight(b)), F.linear(x, w, b))
    torch.testing.assert_close(apply("linear", x.double(), Weight(w.double()), Weight(b.double())), x.double() @ w.double().T + b)


def test_linear_splits_its_outputs() -> None:
    x, w, b = randn(5, 8), randn(12, 8, seed=1), randn(12, seed=2)
    parts = apply("linear", x, Weight(w), Weight(b), splits=(6, 2, 4))
    for part, rows in zip(parts, ((0, 6), (6, 8), (8, 12)), strict=True):
        torch.testing.assert_close(part, F.linear(x, w[slice(*rows)], b[slice(*rows)]))


def test_linear_of_several_heads() -> None:
    x, w = randn(5, 3, 8), randn(6, 8, seed=1)
    torch.testing.assert_close(apply("linear", x, Weight(w)), torch.einsum("thi,oi->tho", x, w))


def test_matmul_is_per_token() -> None:
    a, b, c = randn(4, 2, 3, 5), randn(4, 2, 5, 6, seed=1), randn(5, 6, seed=2)
    torch.testing.assert_close(apply("matmul", a, b), torch.einsum("thmk,thkn->thmn", a, b))
    torch.testing.assert_close(apply("matmul", a, Weight(c)), torch.einsum("thmk,kn->thmn", a, c))


def test_types_of_products() -> None:
    refused("last axis of f32\\[t, 8\\] is not the 7 inputs", "linear", f32(T, 8), f32(6, 7))
    refused("f32 activations with bf16 weights", "linear", f32(T, 8), f32(6, 8).with_dtype("bf16"))
    refused("expected a bias \\[6\\]", "linear", f32(T, 8), f32(6, 8), f32(8))
    refused("do not add up to 6", "linear", f32(T, 8), f32(6, 8), splits=(2, 3))
    refused("a weight is \\[out, in\\]", "linear", f32(T, 8), f32(8))
    refused("expected one token axis, got t, u", "matmul", f32(T, 3, 4), f32(U, 4, 3))
    refused("cannot multiply", "matmul", f32(T, 3, 4), f32(T, 3, 4))
    refused("cannot multiply", "matmul", f32(T, 2, 3, 4), f32(T, 4, 3))  # torch would take the heads for tokens
    refused("cannot multiply", "matmul", f32(T, 1, 3, 4), f32(T, 2, 4, 3))
    refused("unexpected keyword argument 'split'", "linear", f32(T, 8), f32(6, 8), split=(6,))


# --- norms ---


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rms_norm_is_bitwise_that_of_llama(dtype: torch.dtype) -> None:
    x, w = randn(9, 16, dtype=dtype) * 3, (1 + 0.1 * randn(16, seed=1)).to(dtype)
    module = LlamaRMSNorm(16, eps=1e-5).to(dtype)
    with torch.no_grad():
        module.weight.copy_(w)
        assert torch.equal(apply("norm", x, Weight(w), kind="rms", eps=1e-5, cast="early"), module(x))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rms_norm_with_offset_is_bitwise_that_of_gemma(dtype: torch.dtype) -> None:
    x, w = randn(9, 16, dtype=dtype) * 3, (0.1 * randn(16, seed=1)).to(dtype)
    module: Any = GemmaRMSNorm(16, eps=1e-6).to(dtype)
    with torch.no_grad():
        module.weight.copy_(w)
        assert torch.equal(apply("norm", x, Weight(w), kind="rms", eps=1e-6, offset=1.0, cast="late"), module(x))


def test_the_place_of_the_cast_matters_in_half_precision() -> None:
    x, w = randn(64, 64, dtype=torch.bfloat16), (1 + 0.1 * randn(64, seed=1)).bfloat16()
    early, late = (apply("norm", x, Weight(w), kind="rms", eps=1e-6, cast=cast) for cast in ("early", "late"))
    assert not torch.equal(early, late)
    torch.testing.assert_close(early, late)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_equals_torch(dtype: torch.dtype) -> None:
    x, w, b = randn(9, 16, dtype=dtype) * 3 + 1, randn(16, seed=1, dtype=dtype), randn(16, seed=2, dtype=dtype)
    want = F.layer_norm(x, (16,), w, b, 1e-5)
    torch.testing.assert_close(apply("norm", x, Weight(w), Weight(b), kind="layer", eps=1e-5), want)
    torch.testing.assert_close(apply("norm", x, Weight(w), kind="layer", eps=1e-5), F.layer_norm(x, (16,), w, None, 1e-5))
    torch.testing.assert_close(apply("norm", x, kind="layer", eps=1e-5), F.layer_norm(x, (16,), eps=1e-5))


def test_rms_and_l2_norm_equal_their_formulas() -> None:
    x, w = randn(9, 16, dtype=torch.float64), randn(16, seed=1, dtype=torch.float64)
    close = torch.testing.assert_close
    close(apply("norm", x, Weight(w), kind="rms", eps=1e-5), F.rms_norm(x, (16,), w, 1e-5))
    close(apply("norm", x, kind="l2", eps=1e-6), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    heads = randn(9, 2, 8, dtype=torch.float64)  # of every head by itself: query and key norms
    close(apply("norm", heads, Weight(w[:8]), kind="rms", eps=1e-5), F.rms_norm(heads, (8,), w[:8], 1e-5))


def test_types_of_norms() -> None:
    refused("kind 'batch'; expected rms, layer or l2", "norm", f32(T, 8), kind="batch", eps=1e-5)
    refused("cast 'never'; expected early or late", "norm", f32(T, 8), kind="rms", eps=1e-5, cast="never")
    refused("weight f32\\[7\\] does not fit", "norm", f32(T, 8), f32(7), kind="rms", eps=1e-5)
    refused("at most a weight and a bias", "norm", f32(T, 8), f32(8), f32(8), f32(8), kind="rms", eps=1e-5)
    refused("eps", "norm", f32(T, 8), kind="rms")


# --- rotary positions ---

AT = Tokens(torch.tensor([0, 0, 0, 2, 2]), torch.tensor([0, 1, 5, 3, 900]), 3)


def frequencies(half: int) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(half) / half)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rope_is_bitwise_that_of_llama(dtype: torch.dtype) -> None:
    x, freq = randn(5, 3, 8, dtype=dtype), frequencies(4)
    angle = torch.cat((AT.pos[:, None] * freq,) * 2, -1)
    cos, sin = (f(angle).to(dtype) for f in (torch.cos, torch.sin))
    want, _ = apply_rotary_pos_emb(x[None].transpose(1, 2), x[None].transpose(1, 2), cos[None], sin[None])
    assert torch.equal(apply("rope", x, Weight(freq), style="half", at=AT), want.transpose(1, 2)[0])


def test_interleaved_rope_equals_that_of_gptj() -> None:
    x, freq = randn(5, 3, 8), frequencies(4)
    angle = AT.pos[:, None] * freq
    want = rotate_interleaved(x[None], angle.sin()[None], angle.cos()[None])[0]
    torch.testing.assert_close(apply("rope", x, Weight(freq), style="interleaved", at=AT), want)


@pytest.mark.parametrize("style", ["half", "interleaved", "parted"])
def test_rope_turns_pairs_as_complex_numbers(style: str) -> None:
    x, freq = randn(5, 2, 10, dtype=torch.float64), frequencies(3).double()
    turn = torch.polar(torch.full((5, 3), 1.5, dtype=torch.float64), AT.pos[:, None] * freq)[:, None]
    first, second = (x[..., :3], x[..., 3:6]) if style == "half" else (x[..., 0:6:2], x[..., 1:6:2])
    found = apply("rope", x, Weight(freq), style=style, scale=1.5, at=AT)
    z = torch.complex(first, second) * turn
    want = torch.view_as_real(z).flatten(-2) if style == "interleaved" else torch.cat((z.real, z.imag), -1)
    torch.testing.assert_close(found, torch.cat((want, x[..., 6:]), -1))


def test_types_of_rope() -> None:
    refused("style 'full'; expected half, interleaved or parted", "rope", f32(T, 2, 8), f32(4), style="full")
    refused("rotates more than 8 channels", "rope", f32(T, 2, 8), f32(5), style="half")
    refused("expected one token axis, got none", "rope", f32(4, 2, 8), f32(4), style="half")
    refused("expected inv_freq", "rope", f32(T, 2, 8), f32(T, 4), style="half")


# --- embeddings, positions, shapes ---


def test_embed_gather_and_positions() -> None:
    ids, table = torch.tensor([3, 0, 3, 9, 1]), randn(10, 6)
    assert torch.equal(apply("embed", ids, Weight(table)), table[ids])
    assert torch.equal(apply("embed", ids.int(), Weight(table)), table[ids])
    assert torch.equal(apply("gather", Weight(table), ids), table[ids])
    assert torch.equal(apply("positions", randn(5, 2), at=AT), AT.pos)
    refused("expected ids and a table", "embed", f32(T), f32(10, 6))
    refused("expected an index i64\\[n\\]", "gather", f32(10, 6), f32(T))
    refused("expected one token axis, got none", "positions", f32(10, 6))


def test_reduce_view_expand_slice_and_concat() -> None:
    x, y = randn(5, 4, 6), randn(5, 4, 3, seed=1)
    for kind, want in {"sum": x.sum(-1), "mean": x.mean(-1), "max": x.max(-1)[0]}.items():
        assert torch.equal(apply("reduce", x, kind=kind), want)
        assert torch.equal(apply("reduce", x, kind=kind, keepdim=True), want[..., None])
    assert torch.equal(apply("view", x, shape=(3, 8)), x.reshape(5, 3, 8))
    assert torch.equal(apply("slice", x, start=1, stop=4), x[..., 1:4])
    assert torch.equal(apply("slice", x, start=1, stop=3, axis=-2), x[:, 1:3])
    assert torch.equal(apply("concat", x, y, x), torch.cat((x, y, x), -1))
    assert torch.equal(apply("expand", x[:, :1], shape=(4, 6)), x[:, :1].repeat(1, 4, 1))
    refused("cannot repeat the features", "expand", f32(T, 2, 6), shape=(4, 6))
    refused("cannot repeat the features", "expand", f32(T, 6), shape=(4, 6))
    refused("kind 'min'; expected sum, mean or max", "reduce", f32(T, 4), kind="min")
    refused("no feature axis to reduce", "reduce", f32(T), kind="sum")
    refused("has 24 elements per token, not 25", "view", f32(T, 4, 6), shape=(5, 5))
    refused("no channels 4:7", "slice", f32(T, 6), start=4, stop=7)
    refused("no channels 4:4", "slice", f32(T, 6), start=4, stop=4)
    refused("axis=-2; expected -1 to -1", "slice", f32(T, 6), start=0, stop=1, axis=-2)
    refused("shapes differ", "concat", f32(T, 4, 6), f32(T, 3, 6))
    refused("shapes differ", "concat", f32(T, 6), f32(U, 6))


# --- top-k ---


@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 6))
def test_topk_gives_ties_to_the_smaller_index(rows: list[list[int]], k: int) -> None:
    values, indices = apply("topk", torch.tensor(rows, dtype=torch.float32), k=k)
    for row, v, i in zip(rows, values.tolist(), indices.tolist(), strict=True):
        want = sorted(range(6), key=lambda j: (-row[j], j))[:k]
        assert i == want and v == [row[j] for j in want]


def test_types_of_topk() -> None:
    refused("k=5 of the 4 elements", "topk", f32(T, 4), k=5)
    refused("k=0 of the 4 elements", "topk", f32(T, 4), k=0)


# --- experts ---


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("renormalise", [True, False])
def test_route_with_softmax_equals_torch(dtype: torch.dtype, renormalise: bool) -> None:
    logits = randn(7, 8, dtype=dtype)
    p, index = torch.topk(torch.softmax(logits, -1, dtype=torch.float32), 3)
    weight = p / p.sum(-1, keepdim=True) if renormalise else p
    found = apply("route", logits, k=3, renormalise=renormalise)
    assert torch.equal(found[1], index) and torch.equal(found[0], weight.to(dtype))


def test_route_is_that_of_mixtral() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    config = SimpleNamespace(num_experts_per_tok=2, num_local_experts=8, hidden_size=16)
    router: Any = MixtralTopKRouter(config)
    x, w = randn(9, 16), randn(8, 16, seed=1)
    with torch.no_grad():
        router.weight.copy_(w)
        _, weight, index = router(x)
    found = apply("route", F.linear(x, w), k=2)
    assert torch.equal(found[1], index) and torch.equal(found[0], weight)


def test_route_with_sigmoid_and_ties() -> None:
    weight, index = apply("route", torch.tensor([[0.0, 2.0, 2.0, -1.0]]), k=2, kind="sigmoid")
    assert index.tolist() == [[1, 2]] and weight.tolist() == [[0.5, 0.5]]
    weight, index = apply("route", torch.zeros(1, 4), k=2, kind="sigmoid", renormalise=False)
    assert index.tolist() == [[0, 1]] and weight.tolist() == [[0.5, 0.5]]
    refused("kind 'tanh'; expected softmax or sigmoid", "route", f32(T, 4), k=2, kind="tanh")


def test_route_compares_logits_where_their_probabilities_are_equal() -> None:
    logits = torch.tensor([[20.0, -1.0, 30.0, 25.0]])  # in float32 three of them have sigmoid 1
    weight, index = apply("route", logits, k=2, kind="sigmoid", renormalise=False)
    assert index.tolist() == [[2, 3]] and weight.tolist() == [[1.0, 1.0]]


def test_experts_weighted_at_their_inputs_are_those_of_llama4() -> None:
    from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextExperts

    config = SimpleNamespace(
        num_experts_per_tok=2, num_local_experts=4, hidden_size=8, intermediate_size=5, hidden_act="silu"
    )
    router, experts = Llama4Router(config), Llama4TextExperts(config)
    x, up, down = randn(6, 8), randn(4, 8, 10, seed=1), randn(4, 5, 8, seed=2)
    with torch.no_grad():
        router.weight.copy_(randn(4, 8, seed=3))
        experts.gate_up_proj.copy_(up)
        experts.down_proj.copy_(down)
        scores, logits = router(x)
        want = experts(x.repeat(4, 1) * scores.T.reshape(-1, 1)).reshape(4, 6, 8).sum(0)
    gates = apply("route", logits, k=2, kind="sigmoid", renormalise=False)
    found = apply("experts", x, *gates, Weight(up.mT), Weight(down.mT), expr="silu(x0) * x1", weighted="input")
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("weighted", ["input", "output"])
@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_experts_equal_one_token_after_the_other(weighted: str, halves: bool, biased: bool) -> None:
    x, up, down = randn(6, 8), randn(4, 10, 8, seed=1), randn(4, 7, 5, seed=2)
    biases = [randn(4, 10, seed=3), randn(4, 7, seed=4)] if biased else []
    weight, index = apply("route", randn(6, 4, seed=5), k=2)
    weights = map(Weight, (up, down, *biases))
    found = apply("experts", x, weight, index, *weights, expr="silu(x0) * x1", halves=halves, weighted=weighted)
    for t in range(6):
        want = torch.zeros(7)
        for j, e in enumerate(index[t].tolist()):
            before, after = (weight[t, j], 1.0) if weighted == "input" else (1.0, weight[t, j])
            h = up[e] @ (before * x[t]) + (biases[0][e] if biased else 0)
            a, b = (h[:5], h[5:]) if halves else (h[::2], h[1::2])
            want += after * (down[e] @ (F.silu(a) * b) + (biases[1][e] if biased else 0))
        torch.testing.assert_close(found[t], want)


def test_types_of_experts() -> None:
    given = [f32(T, 8), f32(T, 2), i64(T, 2), f32(4, 10, 8), f32(4, 8, 5)]
    refused("of 10 channels does not give 5", "experts", *given, expr="silu(x0)")
    refused("do not fit", "experts", f32(T, 9), *given[1:], expr="x0 * x1")
    refused("expected one token axis, got t, u", "experts", *given[:2], i64(U, 2), *given[3:], expr="x0 * x1")
    refused("weighted 'both'; expected input or output", "experts", *given, expr="x0 * x1", weighted="both")
    refused("expected no biases", "experts", *given, f32(4, 10), expr="x0 * x1")
    refused("expected \\[t, k\\] twice", "experts", *given[:2], i64(T, 3), *given[3:], expr="x0 * x1")
