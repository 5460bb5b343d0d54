"""Passes that calibrate: less error than rounding to nearest, exact folding, and what they leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_llama, tiny_scorer
from torch import nn

import elision
from elision.cli.opening import with_passes
from elision.errors import BadInput
from elision.ir.interp import Interpreter
from elision.ir.program import Program
from elision.ir.tokens import Tokens
from elision.ir.value import Builder, Graph, Value, copy_value, rewrite
from elision.ir.weights import Int4, Int8
from elision.passes import from_text
from elision.passes.calibration import Calibrated, Text, run_score, topics
from elision.passes.pipeline import transform
from elision.passes.weights.chosen import chosen
from elision.passes.weights.compensate import compensated, factor, hessian
from elision.passes.weights.smooth import maxima, scales, smoothable

ENCODINGS = [Int4(16), Int4(64), Int8(32)]
Weights = dict[str, torch.Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(tokens: int, width: int) -> torch.Tensor:
    """Inputs that mostly lie in a few directions, as those of a model do."""
    spread = torch.logspace(0, -2, width)[:, None] * torch.randn(width, width, generator=generator(1))
    return torch.randn(tokens, width, generator=generator(2)) @ spread


def ids(rows: int = 6, length: int = 40, vocab: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=generator(3))


def logits(program: Program, weights: Weights) -> torch.Tensor:
    return run_score(program, weights, list(ids()))[0]


def transformed(program: Program, weights: Weights, *passes: str) -> tuple[Program, Weights]:
    calibrates = any(isinstance(from_text(text), Calibrated) for text in passes)
    return transform(program, weights, passes, Text(ids() if calibrates else None))


def floats(program: Program, weights: Weights) -> Weights:
    """The numbers of all weights, decoded."""
    types = program.params
    return {n: t.encoding.decode(weights[n], t.row) if (t := types[n]).encoding else weights[n] for n in weights}


# The rounding of one matrix.


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_compensated_errors_are_smaller_than_those_of_rounding(encoding: Int4 | Int8) -> None:
    weight, x = torch.randn(24, 192, generator=generator()), correlated(600, 192)
    rows = compensated(weight, factor(hessian(x), 0.01), encoding)
    assert rows.shape == (24, encoding.row_bytes(192)) and rows.dtype == torch.uint8
    errors = [((encoding.decode(r, 192) - weight) @ x.T).norm() for r in (rows, encoding.encode(weight))]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_numbers_that_can_be_held_come_back(encoding: Int4 | Int8) -> None:
    held = encoding.decode(encoding.encode(torch.randn(16, 128, generator=generator())), 128)
    found = encoding.decode(compensated(held, factor(hessian(correlated(300, 128)), 0.01), encoding), 128)
    assert torch.equal(found, held)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_inputs_without_correlation_leave_nothing_to_make_good(encoding: Int4 | Int8) -> None:
    weight = torch.randn(8, 128, generator=generator())
    for h in (3 * torch.eye(128), torch.zeros(128, 128)):
        assert torch.equal(compensated(weight, factor(h, 0.01), encoding), encoding.encode(weight))


def test_factor_is_the_cholesky_of_the_inverse() -> None:
    h = hessian(correlated(100, 12))
    upper = factor(h, 0.1).double()
    inverse = torch.linalg.inv(h.double() + 0.1 * h.double().diagonal().mean() * torch.eye(12, dtype=torch.double))
    torch.testing.assert_close(upper.T @ upper, inverse, rtol=1e-4, atol=1e-8)
    assert torch.equal(upper, upper.triu())


@given(st.integers(0, 2**31), st.sampled_from([1, 4, 8]))
def test_each_column_is_corrected_as_by_solving_for_the_rest(seed: int, outputs: int) -> None:
    """The definition: after input i is fixed, those after it take the values that minimise |x (w - q)|^2 + damping."""
    encoding, width = Int8(4), 8
    weight = torch.randn(outputs, width, generator=generator(seed)).double()
    x = torch.randn(20, width, generator=generator(seed + 1)).double()
    h = 2 * x.T @ x
    h += 0.01 * h.diagonal().mean() * torch.eye(width, dtype=torch.double)
    left, codes = weight.clone(), torch.zeros_like(weight)
    for i in range(width):
        if i % 4 == 0:
            group = encoding.encode(left[:, i : i + 4].float())
            scale = group[:, :2].contiguous().view(torch.float16).double()[:, 0]
        codes[:, i] = (left[:, i] / scale).round().clamp(-127, 127) * scale
        if i + 1 < width:
            rest = slice(i + 1, width)
            left[:, rest] += torch.linalg.solve(h[rest, rest], h[rest, i : i + 1]).T * (left[:, i] - codes[:, i])[:, None]
    found = encoding.decode(compensated(weight, factor(hessian(x), 0.01), encoding), width)
    assert (found - codes).abs().max() <= 1.01 * scale.max() and (found - codes).abs().gt(1e-4).float().mean() < 0.05  # ties


# Whole programs.


def inputs_of(program: Program, weights: Weights) -> dict[str, torch.Tensor]:
    """What the linears of each weight get, in the program as it is."""
    names, found = {id(w): n for n, w in weights.items()}, {}

    def observe(value: Value, operands: Sequence[Any]) -> None:
        if value.op == "linear":
            found[names[id(operands[1])]] = operands[0]

    run_score(program, weights, list(ids()), observe)
    return found


def test_observers_see_every_op_in_order() -> None:
    program, weights = tiny_scorer(layers=1)
    seen: list[str] = []
    at = {"t": Tokens.chunk([3], [0])}
    run = Interpreter(program, weights, observe=lambda value, operands: seen.append(value.op)).run
    assert len(run(program.entries["score"], {"ids": torch.tensor([1, 2, 3])}, at)) == 1
    assert seen[0] == "embed" and seen[1:3] == ["call", "norm"] and seen[-1] == "linear" and seen.count("linear") == 8


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_rounds_blocks_with_less_error_than_int4_and_int8(bits: int) -> None:
    program, weights = tiny_llama(dtype="f32")
    after, found = transformed(program, weights, f"gptq:bits={bits},group=16")
    plainly, plain = transformed(program, weights, f"int{bits}:group=16")
    linears = [n for n, t in after.params.items() if t.encoding]
    assert sorted(linears) == sorted(f"{i}.{w}" for i in range(2) for w in ("q", "k", "v", "o", "gate", "up", "down"))
    assert all(found[n].shape == plain[n].shape and after.params[n] == plainly.params[n] for n in linears)
    assert all(found[n] is w for n, w in weights.items() if n not in linears), "the embedding and the norms stay"
    x, exact = inputs_of(program, weights), floats(program, weights)
    errors = [
        sum(((w[n] - exact[n]) @ x[n].T).norm() ** 2 for n in linears) for w in (floats(after, found), floats(plainly, plain))
    ]
    assert errors[0] < 0.8 * errors[1]
    only = {n: floats(plainly, plain)[n] if n in linears else w for n, w in weights.items()}
    want = logits(program, weights)
    assert (logits(after, found) - want).norm() < (logits(program, only) - want).norm()


def test_gptq_calibrates_on_the_outputs_of_rounded_weights() -> None:
    """The last weight is rounded by the inputs that all other weights, rounded, give it."""
    program, weights = tiny_llama(dtype="f32")
    after, found = transformed(program, weights, "gptq:group=16")
    before_last = {**floats(after, found), "1.down": weights["1.down"]}
    x = inputs_of(program, before_last)["1.down"]
    assert torch.equal(compensated(weights["1.down"], factor(hessian(x), 0.01), Int4(16)), found["1.down"])
    assert not torch.equal(x, inputs_of(program, weights)["1.down"])


def test_gptq_leaves_weights_that_can_be_held() -> None:
    program, weights = tiny_llama(dtype="f32")
    held = floats(*transformed(program, weights, "int4:group=16"))
    after, found = transformed(program, held, "gptq:group=16")
    assert all(torch.equal(w, held[n]) for n, w in floats(after, found).items())


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


def test_shared_weights_and_experts_are_left_alone() -> None:
    program, _ = tiny_llama(dtype="f32")

    def share(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        if v.op == "call" and v.attr("label") == "1.mlp":
            names = [a.attr("name") for a in program.entries["score"].calls()[1].args[1:]]
            same = [b.param(n, program.params[n]) for n in names]
            return b.add_with(v.op, (args[0], *same), dict(v.attrs), None)
        return None

    program.rewrite(share, "score", "prefill", "step")
    assert sorted(chosen(program, Int4(16), "test")) == [f"{i}.{w}" for i in range(2) for w in "koqv"]


@pytest.mark.parametrize("text", ["gptq", "smoothquant-plus:alpha=0.5"])
def test_skipped_layers_and_more_encodings_compose(text: str) -> None:
    program, weights = tiny_llama(layers=3, dtype="f32")
    after, found = transformed(program, weights, text, "int8", "a8", "skip-layers:layers=1")
    assert after.applied == ("skip-layers:layers=1", text, "int8", "a8")
    assert {str(t.encoding) for n, t in after.params.items() if "norm" not in n and n != "inv_freq"} == {
        "int4(group=32)",
        "int8(group=32)",
    }
    assert after.params["embed"].encoding == Int8(32) and not any(n.startswith("1.") for n in found)
    shorter = transformed(program, weights, "skip-layers:layers=1")
    calibrated = transformed(*shorter, text)[1]
    assert all(torch.equal(found[n], w) for n, w in calibrated.items() if n != "embed")
    a8 = [v for g in after.graphs().values() for v in g.values if v.op == "linear"]
    assert a8 and all(v.attr("a8") == 32 for v in a8)


# From a model to an artefact.


@cache
def model(tied: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_native_code_and_artefacts_take_the_weights(tmp_path: Path) -> None:
    passes, prompt = ["gptq:tokens=256", "int8", "a8"], torch.tensor([[3, 5, 7, 11, 2]])
    native = elision.compile(model(), passes, calibration=ids(8, 48, 96), threads=1)
    plain = elision.compile(model(), passes, target="reference", calibration=ids(8, 48, 96))
    assert {n: t.encoding for n, t in native.program.params.items() if "o_proj" in n} == {
        f"model.layers.{i}.self_attn.o_proj.weight": Int4(32) for i in range(2)
    }
    assert all(torch.equal(native.weights[n], w) for n, w in plain.weights.items())
    assert torch.equal(native.generate(prompt, max_new_tokens=8), plain.generate(prompt, max_new_tokens=8))
    plain.save(tmp_path / "m.elision")
    again = elision.load(tmp_path / "m.elision")
    assert again.program == plain.program and again.report["passes"][1] == "gptq:tokens=256"
    assert torch.equal(again(prompt).logits, plain(prompt).logits)
    more = with_passes(elision.load(tmp_path / "m.elision"), [])
    assert torch.equal(more(prompt).logits, plain(prompt).logits)


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
    found = elision.compile(model(tied=False), ["smoothquant-plus:alpha=0.5"], target="reference", calibration=ids(2, 40, 96))
    assert {n for n, t in found.program.params.items() if t.encoding is None and len(t.axes) > 1} == {
        "lm_head.weight",
        "model.embed_tokens.weight",
    }


# What they calibrate on, and what is refused.


def test_sequences_are_spread_evenly() -> None:
    program, _ = tiny_llama(random=False)
    row = torch.arange(64).repeat(40)  # 2560 tokens: five sequences of 512
    assert [len(s) for s in Text(row).sequences(program, 1024)] == [512, 512]
    assert [len(s) for s in Text(row[:700]).sequences(program, 4096)] == [512]
    assert [len(s) for s in Text(row[:300]).sequences(program, 4096)] == [300]
    short = replace(program, meta={**program.meta, "positions": 16})
    assert [len(s) for s in Text(row).sequences(short, 40)] == [16, 16, 16]
    told: list[str] = []

    def encode(text: str) -> list[int]:
        told.append(text)
        return [ord(c) % 64 for c in text[:2000]]

    assert len(Text(None, encode).sequences(program, 1024)) == 2 and told == [topics(0)]
    assert torch.equal(Text(["abc", "", "de"], encode).sequences(program, 9)[0], torch.tensor([ord(c) % 64 for c in "abc"]))
    assert not set(topics(0).splitlines()) >= set(topics(1).splitlines())


@pytest.mark.parametrize(
    ("text", "passes", "says"),
    [
        (Text(), ["gptq"], "came without a tokenizer; give token ids"),
        (Text(["a text"]), ["gptq"], "came without a tokenizer; give token ids"),
        (Text(torch.tensor([[3, 64]])), ["gptq"], "token ids from 3 to 64; expected 0 to 63"),
        (Text(torch.tensor([-1])), ["gptq"], "token ids from -1 to -1"),
        (Text(torch.rand(3)), ["gptq"], "expected a LongTensor"),
        (Text(torch.zeros(1, 2, 3, dtype=torch.int64)), ["gptq"], "expected a LongTensor"),
        (Text(torch.tensor([], dtype=torch.int64)), ["gptq"], "at least one token"),
        (Text([]), ["gptq"], "expected texts"),
        (Text(ids()), ["int8"], "no pass calibrates; those that do are gptq, smoothquant-plus"),
        (Text(ids()), ["gptq:bits=3"], "bits=3; expected 4 or 8"),
        (Text(ids()), ["gptq:damp=0"], "damp=0.0; expected a share"),
        (Text(ids()), ["gptq:damp=nan"], "of the expected type|expected a share"),
        (Text(ids()), ["gptq:group=3"], "expected an even group"),
        (Text(ids()), ["gptq:group=48"], r"nothing to store in int4\(group=48\): tiny has 15 float weights"),
        (Text(ids()), ["gptq:tokens=0"], "tokens=0: expected at least 1"),
        (Text(ids()), ["bf16", "gptq"], "tiny has no float weights"),
        (Text(ids()), ["smoothquant-plus:alpha=1.5"], "alpha=1.5; expected a number from 0 to 1, or search"),
        (Text(ids()), ["smoothquant-plus:alpha=best"], "alpha=best; expected a number from 0 to 1, or search"),
        (Text(ids()), ["smoothquant-plus", "gptq"], "tiny has 1 float weights"),
    ],
)
def test_what_cannot_be_is_told(text: Text, passes: list[str], says: str) -> None:
    program, weights = tiny_llama(dtype="f32")
    with pytest.raises(BadInput, match=says):
        transform(program, weights, passes, text)


def test_text_of_passes() -> None:
    assert from_text("smoothquant-plus:alpha=0.5").text() == "smoothquant-plus:alpha=0.5"
    assert from_text("smoothquant-plus:alpha=search").text() == "smoothquant-plus"
    assert from_text("gptq:damp=0.05,bits=8").text() == "gptq:bits=8,damp=0.05"
