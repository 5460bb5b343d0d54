"""Ops on encoded weights: the numbers of decoding the whole weight first, and the bytes of what is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elision.errors import BadInput
from elision.ir import weights as module
from elision.ir.cost import cost, total
from elision.ir.interp import Interpreter
from elision.ir.op import OPS, Sizes
from elision.ir.program import Program
from elision.ir.tokens import Tokens
from elision.ir.types import DTYPES, Axis, Tensor
from elision.ir.value import Builder
from elision.ir.weights import Blocks, Encoded, Int4, Int8, WeightEncoding
from tests.ops.harness import randn

T = Axis("t")
ENCODINGS: list[WeightEncoding] = [Int8(32), Int8(None), Int4(32), Blocks("BF16"), Blocks("Q4_1"), Blocks("Q8_0"), Blocks("Q5_0")]


def rows(encoding: WeightEncoding, *shape: int) -> torch.Tensor:
    """Stored rows of a weight of this shape; for formats that are not made here, any codes with fitting scales."""
    weight = randn(*shape, seed=3)
    if not isinstance(encoding, Blocks) or encoding.format == "BF16":
        return encoding.encode(weight)
    form = encoding.block(shape[-1])
    count = weight.numel() // form.elements
    blocks = torch.randint(0, 256, (count, form.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fields = 2 if encoding.format == "Q4_1" else 1
    blocks[:, : 2 * fields] = (randn(count, fields, seed=4) * 0.1).half().view(torch.uint8)
    return blocks.reshape(*shape[:-1], -1)


def run(op: str, operands: list[Any], dtype: str, **attrs: Any) -> torch.Tensor:
    """The op's result on activations ``[t, ..]`` and weights: tensors, or pairs of stored rows and their encoding and width."""
    b = Builder("score")
    inputs: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    program = Program("p")
    values = []
    for i, x in enumerate(operands):
        if isinstance(x, torch.Tensor):
            name = {torch.int64: "i64"}.get(x.dtype, dtype)
            values.append(b.input(f"x{i}", Tensor((T, *x.shape[1:]), name)))
            inputs[f"x{i}"] = x
        else:
            weights[f"w{i}"], type = x
            program.params[f"w{i}"] = type
            values.append(b.param(f"w{i}", type))
    graph = b.build(b.add(op, *values, **attrs))
    found = Interpreter(program, weights).run(graph, inputs, {"t": Tokens.chunk([len(operands[0])], [0])})[0]
    assert isinstance(found, torch.Tensor)
    return found


def both(
    op: str, dtype: str, encoding: WeightEncoding, x: list[torch.Tensor], shapes: list[tuple[int, ...]], **attrs: Any
) -> None:  # fmt: skip
    """Encoded weights of these shapes give the numbers of the same weights decoded."""
    stored = [(rows(encoding, *s), Tensor(s, dtype, encoding)) for s in shapes]
    plain = [(encoding.decode(r, t.row).to(DTYPES[dtype]), t.stored(None)) for r, t in stored]
    found, expected = run(op, [*x, *stored], dtype, **attrs), run(op, [*x, *plain], dtype, **attrs)
    assert found.dtype == DTYPES[dtype] and torch.equal(found, expected) and float(expected.abs().max()) > 0


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_linear_embed_and_experts(encoding: WeightEncoding, dtype: str) -> None:
    x = randn(5, 64, dtype=DTYPES[dtype])
    both("linear", dtype, encoding, [x], [(24, 64)])
    both("embed", dtype, encoding, [torch.tensor([3, 0, 3, 9])], [(10, 64)])
    index = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0], [0, 2]])
    weight = randn(5, 2, seed=1, dtype=DTYPES[dtype])
    both("experts", dtype, encoding, [x, weight, index], [(4, 64, 64), (4, 64, 32)], expr="silu(x0) * x1")


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are looked up, and the experts that someone is sent to."""
    seen: list[tuple[int, ...]] = []
    whole = WeightEncoding.decode

    def decode(self: WeightEncoding, rows: torch.Tensor, width: int) -> torch.Tensor:
        seen.append(tuple(rows.shape))
        return whole(self, rows, width)

    monkeypatch.setattr(module.WeightEncoding, "decode", decode)
    e = Int8(32)
    run("embed", [torch.tensor([3, 0, 3]), (rows(e, 10, 64), Tensor((10, 64), "f32", e))], "f32")
    assert seen == [(3, 68)]
    seen.clear()
    stored = [(rows(e, *s), Tensor(s, "f32", e)) for s in ((8, 64, 64), (8, 64, 32))]
    run("experts", [randn(2, 64), randn(2, 1), torch.tensor([[6], [6]]), *stored], "f32", expr="silu(x0) * x1")
    assert seen == [(64, 68), (64, 34)]


def test_other_ops_refuse_encoded_weights() -> None:
    assert {name for name, op in OPS.items() if op.encoded} == {"linear", "embed", "experts"}
    b = Builder("g")
    x = b.input("x", Tensor((T, 32), "f32"))
    w = b.param("w", Tensor((32, 32), "f32", Int8(32)))
    for op, attrs in (("matmul", {}), ("norm", {"kind": "rms", "eps": 1e-6}), ("map", {"expr": "x0 + x1"})):
        with pytest.raises(BadInput, match=rf"{op}\(.*operand 1 cannot be a stored weight"):
            b.add(op, x, w, **attrs)
    with pytest.raises(BadInput, match="operand 0 cannot be a stored weight"):
        b.add("linear", w, w)


def test_cost_counts_stored_bytes() -> None:
    e = Int4(32)
    b = Builder("score")
    ids = b.input("ids", Tensor((T,), "i64"))
    table = b.param("table", Tensor((100, 64), "f32", e))
    h = b.add("embed", ids, table)
    experts = [b.param("up", Tensor((8, 64, 64), "f32", e)), b.param("down", Tensor((8, 64, 32), "f32", e))]
    weight, index = b.add("route", b.add("linear", h, b.param("router", Tensor((8, 64), "f32", Int8(None)))), k=2)
    h = b.add("experts", h, weight, index, *experts, expr="silu(x0) * x1")
    program = Program("p", entries={"score": b.build(b.add("linear", h, table))})
    rows = {r.op: r.weight_bytes for r in cost(program, "score", Sizes(tokens=3))}
    assert rows["embed"] == 3 * 40 and rows["experts"] == 6 / 8 * (8 * 64 * 40 + 8 * 64 * 20)
    linears = [r.weight_bytes for r in cost(program, "score", Sizes(tokens=3)) if r.op == "linear"]
    assert linears == [8 * 66, 100 * 40]
    assert total(cost(program, "score", Sizes(tokens=3))).weight_bytes == sum(rows.values()) + linears[0]


def test_an_encoded_weight_is_no_activation() -> None:
    found = Encoded(rows(Int8(32), 4, 32), Int8(32), 32, torch.bfloat16)
    assert found[1].dtype == torch.bfloat16 and found.decode().shape == (4, 32)
