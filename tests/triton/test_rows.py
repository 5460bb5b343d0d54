"""Norms, tables, rotations, expressions, routing and the choice of the best, under Triton's interpreter, against their ops."""

from __future__ import annotations

import pytest
import torch
import triton
from test_linear import weight, width

from elision.codegen.triton.choose import best_of_tile, best_of_tiles
from elision.codegen.triton.expression import expression
from elision.codegen.triton.moe import expert_gemv, mixed, route
from elision.codegen.triton.rope import rope
from elision.codegen.triton.rows import embed, norm, pointwise, restrict
from elision.ir.ops import dense, moe
from elision.ir.tokens import Tokens


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["rms", "layer", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain,cast", [(0, "late"), (1, "late"), (1, "early"), (2, "early")])
def test_norm(kind: str, dtype: torch.dtype, gain: int, cast: str) -> None:
    x, g, b = randn(3, 2, 24).to(dtype), randn(2, 24, seed=1).to(dtype), randn(24, seed=2).to(dtype)
    g = g if gain == 2 else g[0]
    weights = [g, b][: 0 if not gain else 2 if kind == "layer" else 1]
    y = torch.full_like(x, torch.nan)
    norm[(3, 2)](
        y, x, x.stride(0), g, b, 1e-5, OUTER=2, D=24, DP=32, KIND=kind, OFFSET=0.5, GAIN=gain, BIAS=len(weights) == 2,
        EARLY=cast == "early",
    )  # fmt: skip
    expected = dense.norm(x, *weights, kind=kind, eps=1e-5, offset=0.5, cast=cast)
    assert torch.allclose(y.float(), expected.float(), *([1e-5, 1e-5] if dtype == torch.float32 else [2e-2, 2e-2]))


@pytest.mark.parametrize("style", ["half", "interleaved", "parted"])
@pytest.mark.parametrize("r", [12, 7])
def test_rope(style: str, r: int) -> None:
    x, freq, tokens = randn(4, 3, 24), 100.0 ** (-torch.arange(r) / r), Tokens.chunk([4], [1000])
    y = torch.full_like(x, torch.nan)
    rope[(4, 3)](y, x, x.stride(0), freq, tokens.pos, 1.25, HEADS=3, D=24, DP=32, R=r, STYLE=style)
    assert torch.allclose(y, dense.rope(x, freq, style=style, scale=1.25, at=tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["f32", "bf16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "int4(group=16)", "int8(group=row)"])
def test_embed(format: str) -> None:
    k = width(format)
    planes, form, w = weight(format, 37, k=k)
    ids, y = torch.tensor([36, 0, 17, 17]), torch.full((4, k), torch.nan)
    block = 32 if k < 256 else 256
    embed[(4, -(-k // block))](y, ids, *planes, K=k, FORMAT=form, BK=block)
    assert torch.equal(y.double(), w[ids]) or format not in ("f32", "bf16") and torch.allclose(y.double(), w[ids], rtol=1e-6)


def test_restrict() -> None:
    x, index = randn(5, 40).bfloat16(), torch.tensor([4, 1])
    y = torch.zeros(2, 40, dtype=torch.bfloat16)
    restrict[(2, 2)](y, x, index, K=40, BK=32)
    assert torch.equal(y, x[index])


@pytest.mark.parametrize("text", ["x0 * x1 + x2", "(x0 - x1) * sigmoid(x2)"])
def test_map_broadcasts(text: str) -> None:
    x, per_head, per_channel = randn(3, 2, 40), randn(3, 2, 1, seed=1), randn(40, seed=2)
    y = torch.full_like(x, torch.nan)
    pointwise[(3, 2, 2)](
        y, x, per_head, per_channel, None, 80, 2, 0, 0, OUTER=2, D=40, BD=32, KIND0="full", KIND1="one", KIND2="last", KIND3="",
        EXPR=expression(text),
    )  # fmt: skip
    assert torch.allclose(y, dense.map_(x, per_head, per_channel, expr=text), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind,biased,renormalise", [("softmax", False, True), ("softmax", False, False), ("sigmoid", True, True)]
)
def test_route(kind: str, biased: bool, renormalise: bool) -> None:
    x = randn(6, 11)
    x[0, 3:6] = 5.0  # equal ones: the first counts
    bias = [randn(11, seed=1)] if biased else []
    expected = moe.route(x, *bias, k=3, kind=kind, renormalise=renormalise, eps=1e-6, scale=2.5)
    weights, index = torch.full((6, 3), torch.nan), torch.zeros(6, 3, dtype=torch.int64)
    route[(6,)](
        weights,
        index,
        x,
        bias[0] if bias else None,
        1e-6,
        2.5,
        N=11,
        NP=16,
        K=3,
        KIND=kind,
        RENORMALISE=renormalise,
        BIASED=biased,
    )
    assert torch.equal(index, expected[1]) and torch.allclose(weights, expected[0], rtol=1e-5)


def expert_weight(format: str, n: int, k: int, seed: int) -> tuple[list[torch.Tensor | None], str, torch.Tensor]:
    """Of three experts: planes, how they are read, the weights that they mean."""
    planes, form, w = weight(format, 3 * n, seed, k)
    return [None if p is None else p.view(3, n, -1) for p in planes], form, w.view(3, n, k).float()


@pytest.mark.parametrize("weighted,formats,inner", [
    ("input", ("f32", "f32"), 24), ("output", ("f32", "f32"), 24), ("output", ("Q4_0", "Q6_K"), 256),
    ("output", ("Q8_0", "Q5_K"), 256),
])  # fmt: skip
def test_experts(weighted: str, formats: tuple[str, str], inner: int) -> None:
    x, gate, index = randn(4, 32) * 0.1, randn(4, 2, seed=1).sigmoid(), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]])
    (ups, form, up), (downs, other, down) = expert_weight(formats[0], 2 * inner, 32, 2), expert_weight(formats[1], 32, inner, 3)
    h, parts, y = torch.full((4, 2, inner), torch.nan), torch.full((4, 2, 32), torch.nan), torch.full((4, 32), torch.nan)
    fixed = dict(EXPERTS=3, PICKED=2, BN=16 if inner < 256 else 64, BK=32 if inner < 256 else 128)
    expert_gemv[(8, -(-inner // fixed["BN"]))](
        h, x, gate, index, *ups, FORMAT=form, N=inner, K=32, SHARED=True, WEIGHTED=weighted == "input", PARTS=2,
        EXPR=expression("silu(x0) * x1", 2), **fixed,
    )  # fmt: skip
    expert_gemv[(8, 2)](
        parts, h, gate, index, *downs, FORMAT=other, N=32, K=inner, SHARED=False, WEIGHTED=False, PARTS=1,
        EXPR=expression("x0", 2), **fixed,
    )  # fmt: skip
    mixed[(4, 2)](y, parts, gate, N=32, PICKED=2, WEIGHTED=weighted == "output", BN=16)
    assert torch.allclose(y, moe.experts(x, gate, index, up, down, expr="silu(x0) * x1", weighted=weighted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 5])
def test_the_best_tokens(k: int) -> None:
    x = randn(5, 300)
    x[0, 7] = x[0, 290] = 9.0  # equal ones in different tiles
    x[1, 33] = x[1, 34] = 9.0  # and in one
    x[2, 3:] = float("-inf")  # fewer than k that are possible
    tiles = -(-300 // 64)
    value, index, best = torch.zeros(5, tiles, k), torch.zeros(5, tiles, k, dtype=torch.int64), torch.full((5, k), -1)
    best_of_tile[(tiles, 5)](value, index, x, N=300, TILES=tiles, K=k, BN=64)
    best_of_tiles[(5,)](best, value, index, N=300, TILES=tiles, K=k, BT=triton.next_power_of_2(tiles * k))
    assert torch.equal(best, dense.topk(x, k=k)[1])
