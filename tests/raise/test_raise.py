"""Raising a Llama in all its configurations: exact in float64, and every fault of the frontend is noticed by its own checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import elision
from elision.errors import UnsupportedModel
from elision.frontend import anchors, bias, check, huggingface, lower, operands, raising
from elision.frontend.attention import ATTENTION
from elision.frontend.capture import Captured, capture
from elision.frontend.classify import classify_mask, classify_rope
from elision.frontend.evaluate import evaluate
from elision.frontend.normalise import normalise
from elision.frontend.raising import raise_model
from elision.frontend.structure import Structure, find_structure
from elision.ir.expr import canonical
from elision.ir.mask import Mask
from elision.ir.op import OPS
from elision.ir.value import Graph, rewrite

SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
ROPE: dict[str, dict[str, Any]] = {
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "linear": dict(factor=4.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=16),
}
LLAMAS: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "multi-head": dict(num_key_value_heads=4),
    "multi-query": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "wide heads": dict(head_dim=24),
    "one layer": dict(num_hidden_layers=1),
    "gelu": dict(hidden_act="gelu_pytorch_tanh"),
    "long base": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    **{f"rope {kind}": dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **values)) for kind, values in ROPE.items()},
}


def model(dtype: torch.dtype = torch.float32, family: str = "Llama", **changes: Any) -> nn.Module:
    """A random model whose weights are large enough that every part of it shows in the logits."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    found: nn.Module = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in found.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise * (1.0 if "embed" in name else 2.0 * p.shape[-1] ** -0.5) if p.dim() > 1 else p.data + 0.1 * noise
    return found.to(dtype)


IDS = torch.randint(1, 96, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(found: Any) -> torch.Tensor:
    with torch.no_grad():
        return found(IDS).logits  # type: ignore[no-any-return]


def exact_logits(of: nn.Module) -> torch.Tensor:
    """The captured graph evaluated in float64 throughout (the models force float32 inside norms and rotations)."""
    captured = capture(of)
    captured = replace(captured, graph=normalise(captured.graph))
    ids = next(n for n in captured.graph.nodes if captured.kinds.get(n.name) == "token")
    result = next(n for n in captured.graph.nodes if n.op == "output").all_input_nodes[0]
    positions = torch.arange(IDS.shape[1]).expand_as(IDS).contiguous()
    return evaluate(captured, [result], positions, given={ids: IDS}, wide=True)[0]  # type: ignore[no-any-return]


def error(found: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((found.double() - want.double()).abs().max() / want.double().abs().max())


@pytest.mark.parametrize("name", LLAMAS)
def test_float64_is_exact(name: str) -> None:
    original = model(torch.float64, **LLAMAS[name])
    compiled = elision.compile(original)
    assert set(compiled.program.templates) == {"attn", "mlp"} and compiled.coverage["opaque"] == {}
    assert compiled.coverage["entries"] == {"score": 0, "prefill": 0, "step": 0}
    assert logits(compiled).dtype == torch.float64
    assert error(logits(compiled), exact_logits(original)) <= 1e-9


@pytest.mark.parametrize("name", ["grouped heads", "tied", "biases", "rope llama3"])
def test_float32_is_that_of_transformers(name: str) -> None:
    original = model(**LLAMAS[name])
    assert error(logits(elision.compile(original)), logits(original)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_that_of_transformers(dtype: torch.dtype) -> None:
    original = model(dtype)
    found, theirs, exact = logits(elision.compile(original)), logits(original), exact_logits(original)
    assert found.dtype == dtype
    assert error(found, exact) <= 1.5 * error(theirs, exact)
    assert (found.argmax(-1) == theirs.argmax(-1)).float().mean() >= 0.95


def test_dtype_is_converted_on_a_copy() -> None:
    original = model()
    assert error(logits(elision.compile(original, dtype="float64")), exact_logits(model(torch.float64))) <= 1e-9
    assert {p.dtype for p in original.parameters()} == {torch.float32}


def test_tied_weights_are_stored_once() -> None:
    tied, untied = (elision.compile(model(tie_word_embeddings=t)).weights for t in (True, False))
    table = SIZES["vocab_size"] * SIZES["hidden_size"]
    assert sum(w.numel() for w in untied.values()) == sum(w.numel() for w in tied.values()) + table


# --- mutants: with this fault in the frontend, the model must be refused ---

WINDOW = 6


@cache
def mistral() -> Captured:
    return capture(model(family="Mistral", sliding_window=WINDOW))


def refused(captured: Captured, says: str | None = None) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        raise_model(captured, "tiny", positions=64)


def test_the_model_of_the_mutants_is_raised_without_them() -> None:
    raised = raise_model(mistral(), "tiny", positions=64)
    masks = [dict(v.attr("env", ())).get("mask") for v in raised.program.entries["score"].calls()]
    assert masks[::2] == [Mask("window", WINDOW)] * 2


def on_anchors(monkeypatch: pytest.MonkeyPatch, op: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The anchors of this op are found with other attributes."""
    find = anchors.AnchorFinder.find

    def mutant(*args: Any) -> list[Any]:
        return [replace(a, attrs=change(a.attrs)) if a.op == op else a for a in find(*args)]

    monkeypatch.setattr(anchors.AnchorFinder, "find", mutant)


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("norm", {"eps": 1e-5}),
        ("norm", {"kind": "layer"}),
        ("norm", {"offset": 1.0}),
        ("rope", {"style": "interleaved"}),
        ("rope", {"scale": 1.001}),
    ],
)
def test_a_wrong_attribute_is_noticed(op: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_anchors(monkeypatch, op, lambda attrs: {**attrs, **change})
    refused(mistral(), "template attn of layer 0 differs")


def test_a_position_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the keys alone: a shift of both sides is no fault, since rotations are relative."""
    right = OPS["rope"].body

    def shifted(x: torch.Tensor, *args: Any, at: Any, **attrs: Any) -> torch.Tensor:
        keys = x.shape[1] == SIZES["num_key_value_heads"]
        return right(x, *args, at=replace(at, pos=at.pos + 1) if keys else at, **attrs)

    monkeypatch.setattr(OPS["rope"], "body", shifted)
    refused(mistral(), "template attn of layer 0 differs")


def test_wrong_frequencies_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(*args: Any, **kwargs: Any) -> Any:
        found = classify_rope(*args, **kwargs)
        return found and replace(found, inv_freq=found.inv_freq * 1.01)

    monkeypatch.setattr(anchors, "classify_rope", mutant)
    refused(mistral())


@pytest.mark.parametrize("factor", [1.01, 1.0001])
def test_wrong_frequencies_of_a_fitted_table_are_noticed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J keeps its rotation as a table in float32: the templates are checked with an exact one in its place."""
    gptj = capture(model(family="GPTJ", rotary_dim=8))
    raise_model(gptj, "tiny", positions=64)

    def mutant(*args: Any, **kwargs: Any) -> Any:
        found = classify_rope(*args, **kwargs)
        assert not found.exact
        return replace(found, inv_freq=found.inv_freq * factor)

    monkeypatch.setattr(anchors, "classify_rope", mutant)
    refused(gptj)


@pytest.mark.parametrize(
    "wrong",
    [Mask("full"), Mask("causal"), Mask("window", WINDOW + 1), Mask("window", WINDOW - 1), Mask("chunk", WINDOW)],
    ids=str,
)
def test_a_wrong_mask_is_noticed(wrong: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    assert classify_mask is bias.classify_mask
    monkeypatch.setattr(bias, "classify_mask", lambda *args, **kwargs: wrong)
    refused(mistral(), "differs from the model")


def test_a_mask_of_another_layer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one template that differ by their mask alone: the check of the template cannot see it, that of the model does."""
    mixed = capture(model(family="Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1))
    program = raise_model(mixed, "tiny", positions=64).program
    kinds = [dict(v.attr("env"))["mask"].kind for v in program.entries["score"].calls() if v.attr("env")]
    assert kinds == ["causal", "window"] and len(program.templates) == 2
    right = raising._Raiser._mask
    seen: list[Mask] = []

    def mutant(self: Any, node: Any) -> Mask:
        seen.append(right(self, node))
        return seen[0]

    monkeypatch.setattr(raising._Raiser, "_mask", mutant)
    refused(mixed, "logits of the raised tiny differs")


def test_dropped_rotations_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = anchors.AnchorFinder.find
    monkeypatch.setattr(anchors.AnchorFinder, "find", lambda *args: [a for a in find(*args) if a.op != "rope"])
    refused(mistral())


def test_dropped_norms_are_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    find = anchors.AnchorFinder.find
    monkeypatch.setattr(anchors.AnchorFinder, "find", lambda *args: [a for a in find(*args) if a.op != "norm"])
    program = raise_model(mistral(), "tiny", positions=64).program
    ops = {v.op for g in program.targets.values() for v in g.values}
    assert "norm" not in ops and "reduce" in ops and "aten" not in ops


def test_swapped_operands_of_a_template_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's weight where the other projection's belongs (of the same shape)."""
    right = operands.Operands.weight

    def mutant(self: Any, placeholder: Any, *args: Any) -> str:
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        key = next((k for k in other if k in placeholder.name), None)
        nodes = placeholder.graph.nodes
        name = placeholder.name.replace(key, other[key]) if key else placeholder.name
        return right(self, next(n for n in nodes if n.name == name), *args)

    monkeypatch.setattr(operands.Operands, "weight", mutant)
    refused(mistral(), "template mlp of layer 0 differs")


def test_swapped_weights_of_layers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The template is right, the binding of its operands is not."""
    right = operands.Operands.name

    def mutant(self: Any, operand: Any, segment: Any) -> str:
        return right(self, operand, segment).replace("layers.1.mlp.up", "layers.0.mlp.up")

    monkeypatch.setattr(operands.Operands, "name", mutant)
    refused(mistral(), "logits of the raised tiny differs")


@pytest.mark.parametrize("drop", [0, 1, 2, 3])
def test_a_dropped_block_is_noticed(drop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(*args: Any) -> Structure:
        found = find_structure(*args)
        return replace(found, segments=(*found.segments[:drop], *found.segments[drop + 1 :]))

    monkeypatch.setattr(raising, "find_structure", mutant)
    refused(mistral(), "logits of the raised tiny differs")


def test_a_wrong_pointwise_expression_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def mutant(graph: Graph) -> Graph:
        def rule(b: Any, v: Any, args: Any) -> Any:
            wrong = v.op == "map" and "silu" in v.attr("expr")
            return b.add("map", *args, expr=canonical(v.attr("expr").replace("silu", "gelu"))) if wrong else None

        return rewrite(raising_fuse(graph), rule)

    raising_fuse = raising.fuse_maps
    monkeypatch.setattr(raising, "fuse_maps", mutant)
    refused(mistral(), "template mlp of layer 0 differs")


@pytest.mark.parametrize("wrong", [{"scale": 0.36}, {"softcap": 30.0}])
def test_wrong_attention_is_noticed(wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    right = lower.attention_site
    monkeypatch.setattr(lower, "attention_site", lambda node: replace(right(node), **wrong))
    refused(mistral(), "template attn of layer 0 differs")


@pytest.mark.parametrize("window", [None, WINDOW + 2], ids=["no mask", "wide window"])
def test_a_graph_that_is_not_the_model_is_not_used(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture replaces the attention; with a fault there the graph differs from the model, whose own attention stays."""
    right = huggingface._attend

    def mutant(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        return right(module, q, k, v, None, **{**kwargs, "is_causal": window is not None, "sliding_window": window})

    original = model(family="Mistral", sliding_window=WINDOW)
    assert any(n.target is ATTENTION for n in capture(original).graph.nodes)
    monkeypatch.setattr(huggingface, "_attend", mutant)
    assert not any(n.target is ATTENTION for n in capture(original).graph.nodes)


def test_not_a_number_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    right = check.Interpreter.run

    def mutant(*args: Any) -> Any:
        return tuple(x * torch.nan for x in right(*args))

    monkeypatch.setattr(check.Interpreter, "run", mutant)
    refused(mistral(), "differs from the model by nan")
