"""Products with encoded weights and rows of encoded tables: the kernels against decoding the weight first."""

from __future__ import annotations

import ctypes
from functools import cache, partial

import numpy as np
import pytest
import torch

from elision.codegen.cpu.kernel import Kernel
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.linear import linear, scratch_bytes, tiles
from elision.codegen.cpu.lower import to_object
from elision.codegen.cpu.rows import embed
from elision.ir import schedule as abi
from elision.ir.packing import PANEL, pack, panels
from elision.ir.weights import weight_encoding
from elision.llvm.processor import host_level
from elision.runtime.native.orc import Code

THREADS = 2
#: Formats with numbers of inputs; several blocks, groups of all kinds of sizes.
CASES = [
    ("int8(group=32)", 96), ("int8(group=4)", 20), ("int8(group=48)", 96), ("int8(group=row)", 44), ("int4(group=32)", 96),
    ("int4(group=8)", 24), ("int4(group=64)", 128), ("Q8_0", 96), ("Q4_1", 96), ("Q4_0", 96), ("Q5_0", 96), ("Q5_1", 64),
    ("Q4_K", 512), ("Q5_K", 512), ("Q6_K", 512), ("BF16", 37), ("F16", 37),
]  # fmt: skip
SCALES = {
    "Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,),
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
}  # fmt: skip


def stored(format: str, n: int, k: int) -> torch.Tensor:
    """Rows of a random weight; in formats that come from files any codes, with scales and minima of both signs."""
    encoding, seed = weight_encoding(format), torch.Generator().manual_seed(n + k)
    if format not in SCALES:
        return encoding.encode(torch.randn(n, k, generator=seed))
    form = encoding.block(k)
    blocks = torch.randint(0, 256, (n * k // form.elements, form.nbytes), dtype=torch.uint8, generator=seed)
    for at in SCALES[format]:
        blocks[:, at : at + 2] = (torch.randn(len(blocks), 1, generator=seed) * 0.1).half().view(torch.uint8)
    return blocks.reshape(n, -1)


def plain(format: str, k: int, name: str) -> Kernel:
    return linear(name, [format], k, "x0 + x1", ["row"], tiles(host_level()))


def mixed(name: str) -> Kernel:
    return linear(name, ["Q4_K", "f32", "Q6_K"], 256, "silu(x0) * x1 + x2 - x3", ["tokens"], tiles(host_level()))


@cache
def code() -> tuple[Code, dict[tuple[str, ...], str]]:
    """All kernels, compiled at once."""
    kernels, names = Kernels(), {}
    for format, k in CASES:
        names["linear", format] = kernels.add(("linear", format), partial(plain, format, k))
        names["embed", format] = kernels.add(("embed", format), partial(embed, format=format, width=k))
    names["mixed"] = kernels.add(("mixed",), mixed)
    return Code(to_object(kernels.text(), host_level())), names


def call(name: str, tokens: int, *words: int) -> None:
    """Run a kernel on all threads; its first operand is the axis, of ``tokens`` tokens."""
    row, context = np.zeros(abi.WORDS, np.int64), np.zeros(abi.CONTEXT_WORDS, np.int64)
    row[abi.OPERANDS : abi.OPERANDS + 1 + len(words)] = (abi.AXES, *words)
    context[abi.THREADS], context[abi.AXES] = THREADS, tokens
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(code()[0].address(name))
    for thread in range(THREADS):
        function(row.ctypes.data, context.ctypes.data, thread)


def product(
    name: str, formats: list[str], weights: list[torch.Tensor], x: torch.Tensor, n: int, extra: torch.Tensor
) -> torch.Tensor:
    """The result of a kernel for packed weights; every float that it has no business with is NaN."""
    (t, k), width = x.shape, panels(n) * PANEL
    room = torch.full((t * k + 16,), torch.nan)
    room[: t * k] = x.flatten()
    out, scratch = torch.full((t, width), torch.nan), torch.full((THREADS, scratch_bytes(formats, k) // 4), torch.nan)
    padded = torch.zeros(*extra.shape[:-1], width)
    padded[..., :n] = extra
    packed = [pack(w, f"panel:{f}") for w, f in zip(weights, formats, strict=True)]
    more = [scratch.data_ptr(), 4 * scratch.shape[1], 0] if scratch.numel() else []
    call(
        name, t, room.data_ptr(), 0, k, out.data_ptr(), 0, width, panels(n), *(p.data_ptr() for p in packed),
        padded.data_ptr(), 0, width if padded.dim() == 2 else 0, *more,
    )  # fmt: skip
    return out[:, :n]


def close(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    """Within 1e-5 of the sum of the absolute terms of each number, which is what rounding is relative to."""
    assert bool(((found - expected).abs() <= 1e-5 * scale).all()), float(((found - expected).abs() / scale).max())


@pytest.mark.parametrize("n", [16, 37])
@pytest.mark.parametrize("format,k", CASES)
def test_linear(format: str, k: int, n: int) -> None:
    rows, bias = stored(format, n, k), torch.randn(n, generator=torch.Generator().manual_seed(1))
    weight = weight_encoding(format).decode(rows, k).double()
    for t in (1, 2, 3, 5, 8, 17, 33, 45):
        x = torch.randn(t, k, generator=torch.Generator().manual_seed(t))
        found = product(code()[1]["linear", format], [format], [rows], x, n, bias)
        scale = x.double().norm(dim=1, keepdim=True) * weight.norm(dim=1)
        close(found, x.double() @ weight.T + bias, scale)


@pytest.mark.parametrize("format,k", CASES)
def test_embed_gives_the_decoded_rows(format: str, k: int) -> None:
    rows = stored(format, 37, k)
    ids = torch.tensor([36, 0, 17, 15, 17])
    packed, out = pack(rows, f"panel:{format}"), torch.full((len(ids), k + 3), torch.nan)
    call(
        code()[1]["embed", format], len(ids), ids.data_ptr(), 0, 1, out.data_ptr(), 0, k + 3, packed.data_ptr(), abi.SPLIT,
    )  # fmt: skip
    assert torch.equal(out[:, :k], weight_encoding(format).decode(rows[ids], k)) and bool(out[:, k:].isnan().all())


@pytest.mark.parametrize("t", [1, 2, 9, 40])
def test_weights_of_several_formats_in_one_region(t: int) -> None:
    n, k, formats = 24, 256, ["Q4_K", "f32", "Q6_K"]
    seed = torch.Generator().manual_seed(t)
    x, extra = torch.randn(t, k, generator=seed) * 0.01, torch.randn(t, n, generator=seed)
    weights = [stored(f, n, k) if f != "f32" else torch.randn(n, k, generator=seed) for f in formats]
    plain = [w if f == "f32" else weight_encoding(f).decode(w, k) for w, f in zip(weights, formats, strict=True)]
    a, b, c = (x @ w.T for w in plain)
    found = product(code()[1]["mixed"], formats, weights, x, n, extra)
    assert torch.allclose(found, torch.nn.functional.silu(a) * b + c - extra, rtol=1e-4, atol=1e-4)

