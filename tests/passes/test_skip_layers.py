"""skip-layers equals raising the model without those layers, in structure and in numbers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import pytest
import torch
import transformers
from torch import nn

import elision
from elision.errors import BadInput
from elision.ir.canonical import canonical
from elision.runtime.report import weight_bytes

LAYERS = 5


@cache
def source(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=4, layer_types=kinds)
    else:
        config = transformers.LlamaConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    return model


def without(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A copy without the layers, and without their entries in per-layer lists of the configuration."""
    model = copy.deepcopy(model)
    kept = [i for i in range(LAYERS) if i not in layers]
    stack = model.model.layers
    model.model.layers = nn.ModuleList(stack[i] for i in kept)
    for name, value in list(vars(model.config).items()):
        if isinstance(value, list) and len(value) == LAYERS:
            setattr(model.config, name, [value[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(("text", "layers"), [("1", [1]), ("0", [0]), ("4", [4]), ("1+3-4", [1, 3, 4]), ("1-4", [1, 2, 3, 4])])
def test_equals_the_model_without_the_layers(family: str, text: str, layers: list[int]) -> None:
    skipped = elision.compile(source(family), passes=[f"skip-layers:layers={text}"], dtype="float64")
    removed = elision.compile(without(source(family), layers), dtype="float64")
    assert canonical(skipped.program) == canonical(removed.program)
    ids = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(1))
    want = removed(ids).logits
    assert float((skipped(ids).logits - want).abs().max()) <= 1e-9 * float(want.abs().max())
    assert torch.equal(skipped.generate(ids, max_new_tokens=6), removed.generate(ids, max_new_tokens=6))
    assert weight_bytes(skipped) == weight_bytes(removed)


def test_another_structure_is_told_apart() -> None:
    full = elision.compile(source())
    one = elision.compile(source(), passes=["skip-layers:layers=1"])
    half = elision.compile(source(), passes=["skip-layers:layers=1,half=attn"])
    window = elision.compile(source("gemma3"))
    forms = [canonical(m.program) for m in (full, one, half, window)]
    assert all(a != b for i, a in enumerate(forms) for b in forms[:i])


def test_halves() -> None:
    """Leaving out both halves is leaving out the layer; one half keeps the other's weights and states."""
    both = elision.compile(source(), passes=["skip-layers:layers=2,half=mlp", "skip-layers:layers=2,half=attn"])
    whole = elision.compile(source(), passes=["skip-layers:layers=2"])
    assert canonical(both.program) == canonical(whole.program)
    attn = elision.compile(source(), passes=["skip-layers:layers=2,half=attn"])
    assert len(attn.program.states) == LAYERS - 1 and any("layers.2.mlp" in p for p in attn.program.params)
    mlp = elision.compile(source(), passes=["skip-layers:layers=2,half=mlp"])
    assert len(mlp.program.states) == LAYERS and not any("layers.2.mlp" in p for p in mlp.program.params)
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    stripped = copy.deepcopy(source())
    stripped.model.layers[2].mlp.down_proj.weight.data.zero_()
    assert torch.allclose(mlp(ids).logits, stripped(ids).logits, atol=1e-5)


def test_no_layers_is_the_identity() -> None:
    ids = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    full, none = elision.compile(source()), elision.compile(source(), passes=["skip-layers"])
    assert torch.equal(full(ids).logits, none(ids).logits) and canonical(full.program) == canonical(none.program)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("layers=5", "there is no layer 5; the layers of llama are 0 to 4"),
        ("layers=1,half=top", "half='top'; expected attn or mlp"),
        ("layers=-1", "not of the expected type"),
        ("layers=4-2", "not of the expected type"),
        ("layers=0-4", "every layer"),
    ],
)
def test_bad_layers(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        elision.compile(source(), passes=[f"skip-layers:{text}"])


def test_a_layer_cannot_be_left_out_twice() -> None:
    with pytest.raises(BadInput, match="there is no layer 1; the layers of llama are 0, 2, 3, 4"):
        elision.compile(source(), passes=["skip-layers:layers=1", "skip-layers:layers=1"])
