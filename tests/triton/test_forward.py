"""A model's own forward as launches, under Triton's interpreter: encoders of texts and images, decoders; kernels against their
ops."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import IMAGES, encoder, images, texts
from test_generate import on_gpu
from test_programs import PROMPTS, compiled

import elision
from elision.codegen.triton import compile as rules
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.images import patches, prepend
from elision.codegen.triton.own import attend_own
from elision.errors import BadInput
from elision.ir.attend import attend
from elision.ir.launch import need_kernels
from elision.ir.mask import Mask
from elision.ir.ops import image
from elision.ir.ops.state import fresh
from elision.ir.states import KV, Dense, Float, Segment
from elision.ir.tokens import Tokens
from elision.runtime.model import Model


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "mask,more",
    [
        (Mask("full"), {}), (Mask("causal"), {"softcap": 3.0, "slopes": randn(6, seed=5)}),
        (Mask("window", 5), {"sinks": randn(6, seed=6)}), (Mask("window", 5, 2), {}), (Mask("chunk", 4), {}),
    ],
    ids=lambda x: x.kind if isinstance(x, Mask) else "+".join(x),
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_own_tokens(mask: Mask, more: dict[str, Any], dtype: torch.dtype) -> None:
    """Of sequences of 21, no and 9 tokens at positions with gaps, 3 query heads of a head of keys; values of other sizes."""
    at = Tokens(torch.tensor([0] * 21 + [2] * 9), torch.cat((3 + 2 * torch.arange(21), torch.arange(9))), 3)
    q, k, v = (randn(30, h, d, seed=i).to(dtype) for i, (h, d) in enumerate(((6, 20), (2, 20), (2, 12))))
    out, start = torch.full((30, 6, 12), torch.nan, dtype=dtype), torch.tensor([0, 21, 21, 30])
    attend_own[(6, 6)](
        out, q, 120, k, 40, v, 24, at.pos, start, more.get("slopes"), more.get("sinks"), 0.3, more.get("softcap", 0.0), mask.size,
        mask.sinks, H=2, G=3, GP=4, D=20, DV=12, DP=32, DVP=16, MASK=mask.kind, SOFTCAP="softcap" in more,
        SLOPES="slopes" in more, SINKS="sinks" in more, BM=16, BN=16,
    )  # fmt: skip
    held = Float("f32" if dtype == torch.float32 else "bf16")
    store = fresh(k, v, type=KV(2, 20, 12, (Segment(Dense(), held, held),)), at=at)
    expected = attend(q, store, at, mask, 0.3, **more)[0]
    assert torch.allclose(out.float(), expected.float(), *([1e-4, 1e-5] if dtype == torch.float32 else [2e-2, 2e-2]))


def test_patches_and_tokens_before_them() -> None:
    x, at = randn(2, 3, 9, 13), Tokens.chunk([1, 1], [0, 0])
    expected, of = image.patches(x, height=4, width=5, axis="t", at=at)
    y = torch.full_like(expected, torch.nan)
    patches[(4, 2, 2)](y, x, IMAGE_H=9, IMAGE_W=13, C=3, H=4, W=5, BK=32)
    assert torch.equal(y, expected)
    first, (index, _) = randn(2, 60, seed=1), image.extended(y, k=2, axis="u", at=of)
    z = torch.full((12, 60), torch.nan)
    prepend[(12, 2)](z, y, first, index, N=2, K=60, BK=32)
    assert torch.equal(z, image.prepend(y, first, index))


def forwards(name: str, text: str = "", **changes: Any) -> tuple[Model, Model]:
    """An encoder for the reference interpreter, and on a GPU that is made up."""
    model = elision.compile(encoder(name, **changes), passes=[text] if text else [], target="reference")
    return model, on_gpu(model)[0]


def given(name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    if name in IMAGES:
        return {"pixel_values": images(rows)}
    reads = inspect.signature(encoder(name).forward).parameters
    return {n: x for n, x in texts(rows, length).items() if n in reads}


ENCODERS = ["BertModel", "BertForQuestionAnswering", "AlbertModel", "NomicBertModel", "ViTModel"]
MORE = ["DistilBertModel", "ElectraModel", "BertForPreTraining", "DeiTModel", "Dinov2WithRegistersModel"]
WIDER = ["CLIPVisionModelWithProjection", "ViTForImageClassification", "BertForMaskedLM"]


@pytest.mark.parametrize("name", [*ENCODERS, *(pytest.param(n, marks=pytest.mark.nightly) for n in [*MORE, *WIDER])])
def test_encoders(name: str) -> None:
    """Padded batches of texts, and images; a second call with more tokens needs more memory."""
    model, gpu = forwards(name, **{"n_layers" if name == "DistilBertModel" else "num_hidden_layers": 1})
    for rows, length in ((1, 1), (2, 11)):
        inputs = given(name, rows, length)
        found, want = gpu(**inputs), model(**inputs)
        assert list(found) == list(want)
        for key, exact in want.items():
            assert found[key].shape == exact.shape and found[key].dtype == exact.dtype
            assert float((found[key] - exact).abs().max()) <= 2e-5 * float(exact.abs().max()), key


@pytest.mark.parametrize("family,passes", [("LlamaConfig", ("insert-cache:dtype=int8",)), ("Gemma2Config", ())])
def test_decoders(family: str, passes: tuple[str, ...]) -> None:
    """Of a batch that is padded, beside generating."""
    changes = {"head_dim": 16, "sliding_window": 4, "num_hidden_layers": 2} if family == "Gemma2Config" else {}
    model = compiled(family, passes, **changes)
    gpu, _ = on_gpu(model)
    ids = torch.tensor([PROMPTS[0], [*PROMPTS[1], *[0] * 5]])
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    found, want = gpu(ids, mask)["logits"], model(ids, mask)["logits"]
    assert torch.allclose(found, want, rtol=1e-4, atol=1e-4) and F.cosine_similarity(found[0], found[0].roll(1, 0)).min() < 0.99


def test_a_forward_without_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an encoder when it is compiled; of a decoder, which generates without it, when it is called."""
    monkeypatch.delitem(rules._RULES, "empty")
    model = compiled("LlamaConfig")
    gpu, _ = on_gpu(model)
    assert gpu.generate(torch.tensor(PROMPTS[1:]), max_new_tokens=1).shape == (1, 4)
    with pytest.raises(BadInput, match="empty in score has no kernel"):
        gpu(torch.tensor(PROMPTS[1:]))
    code = plan_program(elision.compile(encoder("RobertaModel", num_hidden_layers=1), target="reference").program)
    with pytest.raises(BadInput, match="pad in score has no kernel"):
        need_kernels("roberta", code)
