"""GPTQ on whole programs: less error than rounding to nearest, also in native code and artefacts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from programs import tiny_llama
from torch import nn

import elision
from elision.cli.opening import with_passes
from elision.ir.program import Program
from elision.ir.value import Builder, Value
from elision.ir.weights import Int4, Int8
from elision.passes.calibration import run_score
from elision.passes.weights.chosen import chosen
from elision.passes.weights.compensate import compensated, factor, hessian
from tests.passes.calibrating import Weights, floats, ids, logits, transformed


def inputs_of(program: Program, weights: Weights) -> dict[str, torch.Tensor]:
    """What the linears of each weight get, in the program as it is."""
    names, found = {id(w): n for n, w in weights.items()}, {}

    def observe(value: Value, operands: Sequence[Any]) -> None:
        if value.op == "linear":
            found[names[id(operands[1])]] = operands[0]

    run_score(program, weights, list(ids()), observe)
    return found


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


@cache
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
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
