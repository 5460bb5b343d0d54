"""SmoothQuant+: exact folding, the search, and what is not folded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from programs import tiny_llama

import elision
from elision.ir.value import Builder, Graph, Value, copy_value, rewrite
from elision.ir.weights import Int4
from elision.passes.calibration import run_score
from elision.passes.weights.chosen import chosen
from elision.passes.weights.smooth import maxima, scales, smoothable
from tests.passes.calibrating import floats, generator, ids, logits, transformed


@pytest.mark.parametrize("alpha", [0.0, 0.35, 1.0])
def test_folding_is_exact(alpha: float) -> None:
    program, weights = tiny_llama()  # float64
    weights = {n: w * 20 if n == "0.attn_norm" else w for n, w in weights.items()}
    norms = smoothable(program, chosen(program, Int4(16), "test"))
    assert [n.gain for n in norms] == ["0.attn_norm", "0.mlp_norm", "1.attn_norm", "1.mlp_norm"]
    assert norms[0].linears == ("0.k", "0.q", "0.v") and norms[1].linears == ("0.gate", "0.up")
    most, folded = maxima(program, weights, list(ids()), [n.linears[0] for n in norms]), dict(weights)
    for norm in norms:
        s = scales(most[norm.linears[0]], [weights[n] for n in norm.linears], alpha)
        changed = norm.folded(weights, s)
        assert not torch.allclose(changed[norm.gain], weights[norm.gain])
        folded |= changed
    torch.testing.assert_close(logits(program, folded), logits(program, weights), rtol=1e-9, atol=1e-9)


def test_scales_balance_activations_and_weights() -> None:
    x, w = torch.tensor([4.0, 1.0, 0.0]), [torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[-2.0, 4.0, 0.0]])]
    torch.testing.assert_close(scales(x, w, 0.5), torch.tensor([2**0.5, 0.5, 1e-5**0.5]))
    torch.testing.assert_close(scales(x, w, 1.0), torch.tensor([4.0, 1.0, 1e-5]))


def test_gains_with_an_offset_and_a_bias_are_folded() -> None:
    from elision.ir.ops.dense import norm
    from elision.passes.weights.smooth import Smoothed

    x, s = torch.randn(5, 8, generator=generator()).double(), torch.rand(8, generator=generator(1)) + 0.5
    before = {"g": torch.randn(8).double(), "b": torch.randn(8).double(), "w": torch.randn(3, 8).double()}
    after = Smoothed("g", "b", 1.0, ("w",)).folded(before, s)
    found, want = (norm(x, w["g"], w["b"], kind="layer", eps=1e-6, offset=1.0) @ w["w"].T for w in (after, before))
    torch.testing.assert_close(found, want)
    assert not torch.allclose(after["b"], before["b"])


def test_smoothquant_plus_finds_the_best_strength_and_tells(caplog: pytest.LogCaptureFixture) -> None:
    program, weights = tiny_llama(dtype="f32")
    for i in range(2):  # outliers, as trained models have them
        weights[f"{i}.attn_norm"] = weights[f"{i}.attn_norm"] * torch.where(torch.arange(32) % 9 == 0, 30, 1)
    want = logits(program, weights)
    with caplog.at_level("INFO", logger="elision"):
        after, found = transformed(program, weights, "smoothquant-plus:group=16")
    assert "alpha" in caplog.text and after.quality == "approximate"
    error = (logits(after, found) - want).norm()
    for alpha in (0.0, 0.5, 1.0):
        assert (
            error <= (logits(*transformed(program, weights, f"smoothquant-plus:group=16,alpha={alpha}")) - want).norm() * 1.0001
        )
    plain = floats(*transformed(program, weights, "int4:group=16"))
    only = {n: plain[n] if t.encoding else weights[n] for n, t in after.params.items()}
    assert error < (logits(program, only) - want).norm()
    assert after.params["embed"].encoding is None and torch.equal(found["norm"], weights["norm"])


def test_a_norm_that_something_else_reads_is_not_folded() -> None:
    """A linear that is not rounded, a second layer that shares the norm, another op: each keeps the norm as it is."""
    program, weights = tiny_llama(dtype="f32")
    linears = chosen(program, Int4(16), "test")
    some = {n: t for n, t in linears.items() if n not in ("0.k", "1.up")}
    assert [n.gain for n in smoothable(program, some)] == ["0.mlp_norm", "1.attn_norm"]

    def share(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op == "call" and v.attr("label") == "1.attn":
            norm = b.param("0.attn_norm", program.params["0.attn_norm"])
            return b.add_with(v.op, (args[0], norm, *args[2:]), dict(v.attrs), None)
        return None

    shared = replace(program, entries=dict(program.entries))
    shared.rewrite(share, "score", "prefill", "step")
    assert [n.gain for n in smoothable(shared, linears)] == ["0.mlp_norm", "1.mlp_norm"]

    leaking = replace(program, templates={**program.templates, "mlp": leak(program.templates["mlp"])})
    assert [n.gain for n in smoothable(leaking, linears)] == ["0.attn_norm", "1.attn_norm"]
    other = replace(leak(program.templates["mlp"]), name="other")  # in one entry only, for one layer
    partly = replace(program, templates={**program.templates, "other": other}, entries=dict(program.entries))
    partly.rewrite(
        lambda b, v, a: b.add_with(v.op, a, {**dict(v.attrs), "target": "other"}, None) if v.attr("label") == "0.mlp" else None,
        "step",
    )
    assert [n.gain for n in smoothable(partly, linears)] == ["0.attn_norm", "1.attn_norm", "1.mlp_norm"]


def leak(graph: Graph) -> Graph:
    """The block with its norm added to its result, as an exit or a router would read it."""
    made: list[Value] = []

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op == "norm":
            made.append(copy_value(b, v, args))
        return b.add("map", args[1], made[0], expr="x0 + x1") if v is graph.outputs[0] else None

    return rewrite(graph, rule)


SIZES = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    initializer_range=0.2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "per_layer"),
    [
        (transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16), [3, 2]),  # gain + 1
        (transformers.PhiConfig(**SIZES), [4]),  # a bias; attention and feed-forward read one norm
        (transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4), [3]),  # a router reads the other
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_norms_of_other_families(config: Any, per_layer: list[int]) -> None:
    torch.manual_seed(0)
    source = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    for parameter in source.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    base = elision.compile(source, target="reference")
    linears, rows = chosen(base.program, Int4(32), "test"), list(ids(4, 40, 96))
    assert not any("expert" in name for name in linears)
    norms, folded = smoothable(base.program, linears), dict(base.weights)
    assert [len(n.linears) for n in norms] == 2 * per_layer
    most = maxima(base.program, base.weights, rows, [n.linears[0] for n in norms])
    for norm in norms:
        folded |= norm.folded(base.weights, scales(most[norm.linears[0]], [base.weights[n] for n in norm.linears], 0.5))
    found, want = (run_score(base.program, w, rows)[0] for w in (folded, base.weights))
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_an_untied_head_is_left_to_the_plain_encodings() -> None:
    source = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    found = elision.compile(source, ["smoothquant-plus:alpha=0.5"], target="reference", calibration=ids(2, 40, 96))
    assert {n for n, t in found.program.params.items() if t.encoding is None and len(t.axes) > 1} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }
