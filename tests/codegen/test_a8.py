"""Integer products: the kernels against the op's own body, on every way that this machine has."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import pytest
import torch

from elision.codegen.cpu.integer_dot import WAYS, best_way
from elision.codegen.cpu.kernels import Kernels
from elision.codegen.cpu.linear_a8 import linear
from elision.codegen.cpu.lower import to_object
from elision.codegen.cpu.quantise import block_bytes, quantise
from elision.ir import schedule as abi
from elision.ir.integers import rounded
from elision.ir.ops.dense import linear as reference
from elision.ir.packing import PANEL, pack, panels
from elision.ir.weights import Blocks, Encoded, Int4, Int8, WeightEncoding
from elision.llvm.processor import host_level
from elision.runtime.native.orc import Code

THREADS = 2
ENCODINGS: list[WeightEncoding] = [Int8(32), Int8(None), Int4(32), Blocks("Q8_0"), Blocks("Q4_0"), Blocks("Q4_1")]
POSSIBLE = [w for w in WAYS if list(WAYS).index(w) >= list(WAYS).index(best_way(host_level()).name)]


def stored(encoding: WeightEncoding, n: int, k: int) -> torch.Tensor:
    """Rows of any codes whatever (-128 among them), with scales and minima of both signs."""
    form = encoding.block(k)
    count = n * k // form.elements
    seed = torch.Generator().manual_seed(n + k)
    blocks = torch.randint(0, 256, (count, form.nbytes), dtype=torch.uint8, generator=seed)
    if encoding in (Int8(32), Int8(None), Blocks("Q8_0")):
        blocks[:, 2:6] = 128
    fields = 2 if encoding in (Int4(32), Blocks("Q4_1")) else 1
    blocks[:, : 2 * fields] = (torch.randn(count, fields, generator=seed) * 0.1).half().view(torch.uint8)
    return blocks.reshape(n, -1)


class Bench:
    """Kernels in memory, called with rows made by hand."""

    def __init__(self, kernels: Kernels) -> None:
        self._code, self._kept = Code(to_object(kernels.text(), host_level())), []

    def call(self, name: str, tokens: int, *words: int) -> None:
        """Run a kernel on all threads; its first operand is the axis, of ``tokens`` tokens."""
        row, context = np.zeros(abi.WORDS, np.int64), np.zeros(abi.CONTEXT_WORDS, np.int64)
        row[abi.OPERANDS : abi.OPERANDS + 1 + len(words)] = (abi.AXES, *words)
        context[abi.THREADS], context[abi.AXES] = THREADS, tokens
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(self._code.address(name))
        for thread in range(THREADS):
            function(row.ctypes.data, context.ctypes.data, thread)


@cache
def bench(way: str, encodings: tuple[WeightEncoding, ...], k: int, expr: str) -> tuple[Bench, str, str]:
    kernels = Kernels()
    quantiser = kernels.add(("quantise", k), lambda n: quantise(n, k))
    formats = [str(e) for e in encodings]
    product = kernels.add(("linear_a8",), lambda n: linear(n, WAYS[way], formats, k, expr, ["row"]))
    return Bench(kernels), quantiser, product


def run(way: str, encodings: tuple[WeightEncoding, ...], x: torch.Tensor, n: int, expr: str = "x0 + x1") -> torch.Tensor:
    """``expr`` of the products of x with a weight in each encoding and a bias, natively."""
    t, k = x.shape
    made, quantiser, product = bench(way, encodings, k, expr)
    blocks = torch.zeros(t * block_bytes(k) + 64, dtype=torch.uint8)
    made.call(quantiser, t, x.data_ptr(), 0, k, blocks.data_ptr(), 0, block_bytes(k), abi.SPLIT)
    width = panels(n) * PANEL
    out, extra = torch.full((t, width), torch.nan), bias(n)
    packed = [pack(stored(e, n, k), f"panel:{e}") for e in encodings]
    made.call(
        product, t, blocks.data_ptr(), 0, block_bytes(k), out.data_ptr(), 0, width, panels(n), *(p.data_ptr() for p in packed),
        extra.data_ptr(), 0, 0,
    )  # fmt: skip
    return out[:, :n]


def bias(n: int) -> torch.Tensor:
    return torch.linspace(-1, 1, panels(n) * PANEL)


def inputs(t: int, k: int) -> torch.Tensor:
    x = torch.randn(t, k, generator=torch.Generator().manual_seed(t)) * torch.logspace(-3, 3, k)
    x[0, :32] = 0
    x[-1, -32:] = 1e-36
    return x


def expected(encoding: WeightEncoding, x: torch.Tensor, n: int) -> torch.Tensor:
    weight = Encoded(stored(encoding, n, x.shape[1]), encoding, x.shape[1], torch.float64)
    rounding = rounded(x, 32).double()
    return reference(rounding, weight)  # type: ignore[return-value]


def close(found: torch.Tensor, wanted: torch.Tensor, encoding: WeightEncoding, x: torch.Tensor, n: int) -> None:
    """Up to rounding of the sums, which grows with the terms and not with what is left of them."""
    weight = encoding.decode(stored(encoding, n, x.shape[1]), x.shape[1]).double().abs()
    terms = x.double().abs() @ weight.T
    assert bool(((found - wanted).abs() <= 3e-6 * terms + 1e-6).all())


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("way", POSSIBLE)
def test_products(way: str, encoding: WeightEncoding) -> None:
    n, k = 40, 96
    for t in (1, 2, 3, 8, 15):
        x = inputs(t, k)
        found = run(way, (encoding,), x, n)
        close(found, expected(encoding, x, n) + bias(n)[:n], encoding, x, n)


@pytest.mark.parametrize("way", POSSIBLE)
def test_two_weights_in_one_region(way: str) -> None:
    x, n = inputs(5, 64), 16
    found = run(way, (Int8(32), Int4(32)), x, n, "x0 * silu(x1) + x2")
    gate = expected(Int4(32), x, n)
    wanted = expected(Int8(32), x, n) * gate * torch.sigmoid(gate) + bias(n)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("way", POSSIBLE)
def test_largest_sums(way: str) -> None:
    """All codes at their ends: no sum of 16 bits may overflow."""
    x = torch.full((8, 64), 127.0)
    for encoding, byte in ((Blocks("Q8_0"), 128), (Blocks("Q8_0"), 127), (Blocks("Q4_0"), 255), (Blocks("Q4_1"), 255)):
        form = encoding.block(64)
        blocks = torch.full((16 * 2, form.nbytes), byte, dtype=torch.uint8)
        blocks[:, : 2 * (2 if "1" in str(encoding) else 1)] = torch.tensor([0, 60] * (2 if "1" in str(encoding) else 1))
        rows = blocks.view(16, -1)
        made, quantiser, product = bench(way, (encoding,), 64, "x0 + x1")
        data, out, zero = torch.zeros(8 * block_bytes(64), dtype=torch.uint8), torch.zeros(8, 16), torch.zeros(16)
        made.call(quantiser, 8, x.data_ptr(), 0, 64, data.data_ptr(), 0, block_bytes(64), abi.SPLIT)
        packed = pack(rows, f"panel:{encoding}")
        made.call(
            product, 8, data.data_ptr(), 0, block_bytes(64), out.data_ptr(), 0, 16, 1, packed.data_ptr(), zero.data_ptr(), 0, 0
        )
        assert torch.equal(out, x @ encoding.decode(rows, 64).T)


def test_what_is_not_a_number_shows() -> None:
    x = torch.ones(2, 64)
    x[0, 40], x[1, 3] = torch.nan, torch.inf
    assert bool(run(best_way(host_level()).name, (Int8(32),), x, 16).isnan().all()) and bool(rounded(x, 32)[0, 32:].isnan().all())
