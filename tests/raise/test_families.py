"""Every decoder family: the logits, the tokens through the inserted cache, skipped layers; and mutants that must be noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from encoders import IMAGES, TEXTS
from families import DECODERS, FAMILIES, FEW, LONG, decoder
from table import AGAIN, KEPT, read, row
from torch import nn

import elision
from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.value import Builder, Value, rewrite
from elision.runtime.model import Model
from elision.runtime.session import Session

PROMPT, NEW = 20, 32


@cache
def source(family: str) -> nn.Module:
    return decoder(family)


@cache
def compiled(family: str) -> Model:
    return elision.compile(source(family))


@cache
def reference(family: str) -> torch.Tensor:
    """Greedy tokens of transformers without a cache; asserts that the text can show a fault."""
    tokens = torch.randint(3, 120, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    margins = []
    with torch.no_grad():
        for _ in range(NEW):
            best, ids = source(family)(tokens, use_cache=False).logits[0, -1].topk(2)
            margins.append(float(best[0] - best[1]))
            tokens = torch.cat((tokens, ids[:1][None]), 1)
    assert len(set(tokens[0, PROMPT:].tolist())) >= 8, "the text hardly varies"
    assert min(margins) > 1e-3, "the best two tokens are too close to tell a fault from rounding"
    return tokens


def greedy(model: Model, family: str) -> torch.Tensor:
    found: torch.Tensor = model.generate(reference(family)[:, :PROMPT], max_new_tokens=NEW, eos_token_id=[])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_logits_and_coverage(family: str) -> None:
    tokens = reference(family)
    model = compiled(family)
    assert set(model.coverage["entries"].values()) == {0}
    with torch.no_grad():
        want = source(family)(tokens).logits
    assert float((model(tokens).logits - want).abs().max()) <= 1e-5 * float(want.abs().max())
    assert torch.equal(greedy(model, family), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_its_row(family: str) -> None:
    assert read().get(family) == row(family, compiled(family)), f"{KEPT} is not what is raised: run {AGAIN}"


def test_the_table_has_no_other_rows() -> None:
    assert list(read()) == [*DECODERS, *TEXTS, *IMAGES], f"{KEPT} is not what is raised: run {AGAIN}"


@pytest.mark.parametrize("family", FEW)
def test_skipped_layer_equals_the_model_without_it(family: str) -> None:
    skipped = elision.compile(source(family), passes=["skip-layers:layers=1"], dtype="float64")
    without = elision.compile(without_layer(source(family), 1), dtype="float64")
    tokens = reference(family)
    want = without(tokens).logits
    assert float((skipped(tokens).logits - want).abs().max()) <= 1e-9 * float(want.abs().max())
    assert torch.equal(greedy(skipped, family), greedy(without, family))
    assert not torch.equal(skipped(tokens).logits, compiled(family)(tokens).logits.double())


def without_layer(model: nn.Module, index: int) -> nn.Module:
    """A copy of a model of transformers without one layer, and without its entries in per-layer lists of the configuration."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == 4 and name in ("layers", "h", "layer", "blocks"):
                del child[index]
    config: Any = model.config
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == 4:
            setattr(config, name, value[:index] + value[index + 1 :])
    config.num_hidden_layers = 3
    return model


# --- mutants: the same comparison must fail ---


def mutant(family: str, rule: Callable[[Builder, Value, tuple[Value, ...]], Value | None]) -> Model:
    """The compiled model with every graph rewritten."""
    good = compiled(family)
    program: Program = good.program.copy()
    program.templates = {n: rewrite(g, rule) for n, g in program.templates.items()}
    program.rewrite(rule)
    return Model(
        program, good.weights, tokenizer=None, defaults={}, coverage=good.coverage, max_context=good.max_context
    )


def other_mask(change: Callable[[Mask], Mask]) -> Callable[[Builder, Value, tuple[Value, ...]], Value | None]:
    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        env = dict(v.attr("env", ()))
        if v.op != "call" or "mask" not in env:
            return None
        return b.add_with("call", args, {**dict(v.attrs), "env": (("mask", change(env["mask"])),)}, None)

    return rule


def without_head_norm(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
    return args[0] if v.op == "norm" and len(args[0].tensor.axes) == 3 else None


def without_softcap(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
    if v.op != "attend":
        return None
    return b.add_with("attend", args, {k: a for k, a in v.attrs if k != "softcap"}, None)


def other_slopes(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[str], Model]:
    def of(family: str) -> Model:
        good = compiled(family)
        names = [n for n in good.weights if n.startswith("alibi.slopes")]
        assert names
        weights = {n: change(w) if n in names else w for n, w in good.weights.items()}
        return Model(
            good.program, weights, tokenizer=None, defaults={}, coverage=good.coverage, max_context=good.max_context
        )

    return of


@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon_alibi"])
@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, torch.neg, lambda s: s.roll(1), lambda s: s * 1.1],
    ids=["dropped", "turned", "of the next head", "steeper"],
)
def test_other_alibi_slopes_show(family: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    bad = other_slopes(change)(family)
    tokens = reference(family)
    with torch.no_grad():
        want = source(family)(tokens).logits
    assert float((bad(tokens).logits - want).abs().max()) > 1e-3 * float(want.abs().max())


@pytest.mark.parametrize("family", LONG)
def test_a_dropped_mask_shows(family: str) -> None:
    bad = mutant(family, other_mask(lambda m: Mask("full")))
    tokens = reference(family)
    assert not torch.allclose(bad(tokens).logits, compiled(family)(tokens).logits, rtol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss", "gpt_neo"])
@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one_shows(family: str, off: int) -> None:
    bad = mutant(family, other_mask(lambda m: Mask(m.kind, m.size + off) if m.kind == "window" else m))
    assert not torch.equal(greedy(bad, family), reference(family))


@pytest.mark.parametrize("family", LONG)
def test_a_position_off_by_one_shows(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Session._run

    def shifted(self: Session, graph: Any, inputs: Any, at: Any) -> Any:
        return before(self, graph, inputs, replace(at, pos=at.pos + 1) if graph.name == "round" else at)

    monkeypatch.setattr(Session, "_run", shifted)
    session_positions_matter = greedy(compiled(family), family)
    assert not torch.equal(session_positions_matter, reference(family))


@pytest.mark.parametrize("size", [15, 17])
def test_a_chunk_off_by_one_shows(size: int) -> None:
    assert {m.size for m in masks("llama4") if m.kind == "chunk"} == {16}
    bad = mutant("llama4", other_mask(lambda m: Mask("chunk", size) if m.kind == "chunk" else m))
    assert not torch.equal(greedy(bad, "llama4"), reference("llama4"))


def test_chunks_that_are_dropped_or_given_to_all_layers_show() -> None:
    assert [m.kind for m in masks("llama4")] == ["chunk", "chunk", "causal", "causal"]
    for wrong in (Mask("causal"), Mask("chunk", 16)):
        assert not torch.equal(greedy(mutant("llama4", other_mask(lambda m, w=wrong: w)), "llama4"), reference("llama4"))  # type: ignore[misc]


def masks(family: str) -> list[Mask]:
    """The masks of the layers, in order."""
    envs = [dict(v.attr("env", ())) for v in compiled(family).program.entries["score"].calls()]
    return [env["mask"] for env in envs if "mask" in env]


def without_temperature(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
    if v.op != "map" or "log1p" not in v.attr("expr"):
        return None
    return b.add_with("map", args, {**dict(v.attrs), "expr": "x0 * 0.0 + 1.0"}, None)


def weighted_outputs(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
    if v.op != "experts":
        return None
    return b.add_with("experts", args, {k: a for k, a in v.attrs if k != "weighted"}, None)


@pytest.mark.parametrize("rule", [without_temperature, weighted_outputs])
def test_a_dropped_temperature_and_experts_weighted_at_their_outputs_show(rule: Any) -> None:
    assert not torch.equal(greedy(mutant("llama4", rule), "llama4"), reference("llama4"))


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "llama4"])
def test_a_skipped_query_key_norm_shows(family: str) -> None:
    assert not torch.equal(greedy(mutant(family, without_head_norm), family), reference(family))


def test_a_dropped_softcap_shows() -> None:
    tokens = reference("gemma2")
    bad = mutant("gemma2", without_softcap)
    assert not torch.allclose(bad(tokens).logits, compiled("gemma2")(tokens).logits, rtol=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [{"groups": 1}, {"group_best": 1}, {"scale": 1.0}, {"renormalise": False, "scale": 1.0}, {"kind": "softmax"}, {}],
    ids=str,
)
def test_wrong_routing_shows(wrong: dict[str, Any]) -> None:
    """An empty ``wrong`` leaves out the bias."""

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Any:
        return b.add_with("route", args if wrong else args[:1], {**dict(v.attrs), **wrong}, None) if v.op == "route" else None

    tokens = reference("deepseek_v3")
    found, right = mutant("deepseek_v3", rule)(tokens).logits, compiled("deepseek_v3")(tokens).logits
    assert float((found - right).abs().max()) > 1e-2 * float(right.abs().max())


def test_latent_attention_keeps_keys_and_values_per_head() -> None:
    """Keys have more channels than values, and every head its own."""
    caches = [v.type for g in compiled("deepseek_v3").program.targets.values() for v in g.values if v.op == "append"]
    assert caches and {(c.heads, c.dim, c.vdim) for c in caches} == {(4, 20, 10)}
    assert {v.attr("style") for v in rotations("deepseek_v3")} == {"parted"}
    assert {v.attr("style") for v in rotations("deepseek_v3_halves")} == {"half"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_half_precision(dtype: torch.dtype) -> None:
    """As good as transformers' own for most tokens: a rounding may send a token to another expert."""
    narrow = copy.deepcopy(source("deepseek_v3")).to(dtype)
    exact = copy.deepcopy(narrow).double()
    exact.set_experts_implementation("eager")
    tokens = reference("deepseek_v3")
    with torch.no_grad():
        want, theirs = exact(tokens).logits, narrow(tokens).logits
    found = elision.compile(narrow)(tokens).logits
    assert found.dtype == dtype
    ours, usual = ((x.double() - want).abs().amax(-1).median() for x in (found, theirs))
    assert float(ours) <= 1.5 * float(usual)
    plain = elision.compile(narrow, target="reference")
    first = tokens[:1, :8]
    assert torch.equal(elision.compile(narrow).generate(first, max_new_tokens=12), plain.generate(first, max_new_tokens=12))


def rotations(family: str) -> list[Value]:
    return [v for g in compiled(family).program.templates.values() for v in g.values if v.op == "rope"]
