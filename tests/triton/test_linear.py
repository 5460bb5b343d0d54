"""Products under Triton's interpreter: every format of weights, the norm before them, the expression after them."""

from __future__ import annotations

import pytest
import torch
from test_decode import stored

from elision.codegen.triton.expression import expression
from elision.codegen.triton.linear import gemm, gemv
from elision.ir import expr as scalar
from elision.ir.ops.dense import norm
from elision.ir.planes import plane_form, planes
from elision.ir.weights import weight_encoding

FORMATS = [
    "int8(group=32)",
    "int8(group=16)",
    "int8(group=row)",
    "int4(group=32)",
    "int4(group=16)",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "BF16",
    "F16",
]
K = 96


def width(*formats: str) -> int:
    """Inputs of a product with weights in these formats: some blocks, and not a power of two."""
    return 768 if any(f.endswith("_K") for f in formats) else K


def bounded(x: torch.Tensor) -> torch.Tensor:
    """A copy, behind which no numbers lie: whoever reads beyond its end finds NaN."""
    data = torch.full((x.numel() * x.element_size() + 8192,), 255, dtype=torch.uint8).view(x.dtype)
    data[: x.numel()] = x.flatten()
    return data[: x.numel()].view_as(x)


def weight(format: str, n: int, seed: int = 0, k: int = K) -> tuple[list[torch.Tensor | None], str, torch.Tensor]:
    """Planes (codes, scales, minima), how they are read, and the weights that they mean."""
    if format in ("f32", "bf16", "f16"):
        dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[format]
        plain = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return [bounded(plain), None, None], "float", plain.double()
    encoding = weight_encoding(format)
    rows, form = stored(format, n, k), plane_form(encoding, k)
    assert form is not None
    parts = map(bounded, planes(rows, encoding, form))
    return [*parts, None, None][:3], form.text, encoding.decode(rows, k).double()


def products(x: torch.Tensor, formats: list[str], n: int, expr: str, extras: dict[str, torch.Tensor], gain: torch.Tensor | None,
             many: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the kernel gives, and what it should, in float64."""
    (t, k), made = x.shape, [weight(f, n, i, x.shape[1]) for i, f in enumerate(formats)]
    (p0, f0, w0), (p1, f1, w1) = made if len(made) == 2 else (made[0], ([None] * 3, "", None))
    kinds, more = [*extras, "", ""][:2], [*extras.values(), None, None][:2]
    names = [f"x{i}" for i in range(len(made) + len(extras))]
    slots = ["x0", "x1"][: len(made)] + ["x2", "x3"][: len(extras)]
    for name, slot in reversed(list(zip(names, slots, strict=True))):
        expr = expr.replace(name, slot)
    y = torch.full((t, n), torch.nan)
    args = [y, x, gain, *p0, *p1, *more, 1e-5]
    fixed = dict(
        N=n, K=k, FORMAT0=f0, FORMAT1=f1, NORM=gain is not None, OFFSET=1.0, KIND0=kinds[0], KIND1=kinds[1],
        EPILOGUE=expression(scalar.canonical(expr)),
    )  # fmt: skip
    if many:
        gemm[(-(-n // 16), -(-t // 16))](*args, t, **fixed, BM=16, BN=16, BK=32 if k == K else 256)
    else:
        gemv[(-(-n // 16), t)](*args, **fixed, BN=16, BK=64 if k == K else 256)
    wide = x.double()
    if gain is not None:
        wide = norm(wide, gain.double(), kind="rms", eps=1e-5, offset=1.0)
    given = [wide @ w.T for w in (w0, w1) if w is not None]
    filled = [
        *given,
        *([wide.new_zeros(())] * (2 - len(given))),
        *(e.double() for e in extras.values()),
        *([wide.new_zeros(())] * 2),
    ]
    expected = scalar.compiled(scalar.canonical(expr))(*filled[:4])
    return y.double(), expected


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("format", [*FORMATS, "f32", "bf16", "f16"])
def test_every_format(format: str, many: bool) -> None:
    for t, n in ((1, 16), (17, 37)) if many else ((2, 37),):
        x = torch.randn(t, width(format), generator=torch.Generator().manual_seed(t))
        found, expected = products(x, [format], n, "x0", {}, None, many)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_and_epilogue(dtype: torch.dtype, many: bool) -> None:
    seed = torch.Generator().manual_seed(3)
    t, n = 5, 40
    x, residual, bias = (torch.randn(*s, generator=seed).to(dtype) for s in ((t, K), (t, n), (n,)))
    gain = (torch.randn(K, generator=seed) * 0.1).to(dtype)
    extras = {"tokens": residual, "row": bias}
    found, expected = products(
        x, ["bf16" if dtype != torch.float16 else "f16", "Q4_1"], n, "silu(x0) * x1 + x2 - x3", extras, gain, many
    )
    near = {torch.float32: 1e-5, torch.bfloat16: 3e-2 if many else 1e-5, torch.float16: 5e-3 if many else 1e-5}[dtype]
    assert torch.allclose(found, expected, rtol=near, atol=near * float(expected.abs().max()))


@pytest.mark.parametrize(
    "text",
    [
        "gelu(x0)",
        "gelu_tanh(x0)",
        "relu(x0) ** 2",
        "30.0 * tanh(x0 / 30.0)",
        "softplus(x0)",
        "x0 * sigmoid(1.702 * x0)",
        "minimum(x0, 0.5)",
        "where(x0 > 0, x0, 0.1 * x0)",
    ],
)
def test_expressions(text: str) -> None:
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(7))
    found, expected = products(x, ["f32"], 16, text, {}, None, False)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_planes_keep_every_bit(format: str) -> None:
    """One bit set in a row of zeros is one bit set in its planes, each at a place of its own: as many bytes as in the file."""
    encoding, k = weight_encoding(format), width(format)
    size, form = encoding.row_bytes(k), plane_form(encoding, k)
    assert form is not None
    bits = (torch.arange(8 * size)[:, None] == torch.arange(8 * size)).view(8 * size, size, 8)
    rows = (bits.int() << torch.arange(8)).sum(-1).to(torch.uint8)
    parts = torch.cat([p.flatten(1).contiguous().view(torch.uint8) for p in planes(rows, encoding, form)], 1)
    assert parts.shape == rows.shape
    moved = (parts[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1).int()
    assert torch.equal(moved.sum(0), torch.ones(8 * size)) and torch.equal(moved.sum(1), torch.ones(8 * size))
