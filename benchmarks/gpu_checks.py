"""Kernels on a device against the same in float64, launch by launch, with the operands that they had there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from elision.ir import expr
from elision.ir.launch import Kernel
from elision.ir.ops.dense import norm, rope
from elision.ir.schedule import Row
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens
from elision.runtime.cuda.decode import Decoder
from elision.runtime.cuda.engine import Caches, Call, Engine

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: The most that is right, by the type of the result: half precision rounds what it multiplies too.
LIMITS = {"fp32": 1e-4, "bf16": 4e-2, "fp16": 5e-3}


class Launched:
    """One launch of a call: its kernel, and its operands as tensors of the host."""

    def __init__(self, engine: Engine, call: Call, caches: Caches, row: Row) -> None:
        self.engine, self.call, self.caches, self.row = engine, call, caches, row
        self.kernel: Kernel = engine.code.kernels[row.kernel]
        self._operands = dict(zip(self.kernel.types, row.operands[1:], strict=True))

    def run(self) -> None:
        call = self.call
        whole, call.schedule = call.schedule, replace(call.schedule, rows=[self.row])
        self.engine.run(call, self.caches)
        call.schedule = whole

    def number(self, name: str) -> Any:
        return self.engine._argument(self._operands[name], self.call, self.caches)

    def _type(self, name: str) -> str:
        return self.kernel.types[name].removeprefix("*").removesuffix(":16")

    def limit(self, name: str) -> float:
        return LIMITS[self._type(name)]

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """An operand in float64."""
        found = torch.empty(shape, dtype=_TYPES[self._type(name)])
        self.engine.device.read(int(self.number(name)), found)
        return found.double()

    def weight(self, name: str, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        _, param, _ = self._operands[name]
        type = self.engine.program.params[param]
        return (weights[param] if type.encoding is None else type.encoding.decode(weights[param], type.row)).double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def product_error(launch: Launched, weights: Mapping[str, torch.Tensor]) -> float:
    """Of ``gemv`` and ``gemm`` (`elision.codegen.triton.linear`); their operands are read before, as results may replace them."""
    fixed, tokens, n = launch.kernel.constants, launch.call.counts[_axis(launch)], int(launch.number("N"))
    x = launch.tensor("x", tokens, fixed["K"])
    extras = [
        launch.tensor(f"e{i}", *((n,) if fixed[f"KIND{i}"] == "row" else (tokens, n))) for i in range(2) if fixed[f"KIND{i}"]
    ]
    if fixed["NORM"]:
        x = norm(x, launch.weight("g", weights), kind="rms", eps=launch.number("eps"), offset=fixed["OFFSET"])
    given = [x @ launch.weight(f"w{i}", weights).T for i in range(2) if fixed[f"FORMAT{i}"]]
    zero = [x.new_zeros(())] * 2
    expected = expr.compiled(fixed["EPILOGUE"]["expression"])(*[*given, *zero][:2], *[*extras, *zero][:2])
    launch.run()
    return error(launch.tensor("y", tokens, n), expected)


def _axis(launch: Launched) -> int:
    """Whose tokens a launch is of: its grid says so."""
    _, grid = launch.row.operands[0]
    return next(int(part[1]) for part in grid if isinstance(part, tuple) and part[0] == "tokens")


def attention_error(launch: Launched, q: torch.Tensor, store: KVStore, at: Tokens) -> float:
    """Of causal attention that has just run, of queries ``[tokens, heads, dim]`` over what the device's cache has."""
    scale = q.shape[-1] ** -0.5
    kept = store.type.heads
    expected = q.new_empty(*q.shape[:2], store.type.vdim)
    most = int(at.pos.max()) + 1
    k, v = (store.segments[0].read_all(what, most, torch.float64) for what in "kv")
    for i, (row, pos) in enumerate(zip(at.row.tolist(), at.pos.tolist(), strict=True)):
        each = q[i].view(kept, -1, q.shape[-1])
        p = (each @ k[row, :, : pos + 1].transpose(-1, -2) * scale).softmax(-1)
        expected[i] = (p @ v[row, :, : pos + 1]).view(q.shape[1], -1)
    return error(launch.tensor("out", *expected.shape), expected)


def projection_error(launch: Launched, weights: Mapping[str, torch.Tensor], at: Tokens) -> float:
    """Of ``project`` (`elision.codegen.triton.project`) of heads that are turned and nothing else: the worst of queries, and of
    what the cache has then."""
    fixed, dim = launch.kernel.constants, launch.kernel.constants["D"]
    assert not fixed["BIAS"] and not fixed["HEAD_NORM"] and fixed["NORM"] and fixed["R"]
    x = launch.tensor("x", len(at), fixed["K"])
    x = norm(x, launch.weight("g", weights), kind="rms", eps=launch.number("eps"), offset=fixed["OFFSET"])
    expected = [torch.unflatten(x @ launch.weight(f"w{part}", weights).T, 1, (-1, dim)) for part in "qkv"]
    freq, scale = launch.weight("freq", weights), launch.number("factor")
    expected[:2] = [rope(each, freq, style=fixed["STYLE"], scale=scale, at=at) for each in expected[:2]]
    launch.run()
    store = cached(launch.caches, launch.row, at.rows)
    k, v = (store.segments[0].read_all(what, int(at.pos.max()) + 1, torch.float64) for what in "kv")
    found = launch.tensor("q", len(at), fixed["HEADS"], dim), k[at.row, :, at.pos], v[at.row, :, at.pos]
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


def cached(caches: Caches, row: Row, rows: int) -> KVStore:
    """What a launch's cache has on the device."""
    name = next(o[1] for o in row.operands if o[0] == "state")
    cache = caches[name]
    store = KVStore(cache.type, rows, cache.capacity)
    for what in "kv":
        for array, found in store.segments[0].planes[what].arrays.items():
            found.copy_(cache.read(what if array == "codes" else f"{what}_{array}").view_as(found))
    return store


def errors(engine: Engine, weights: Mapping[str, torch.Tensor], rows: int, prompt: int) -> Iterator[tuple[str, float, float]]:
    """Of every product, projection and attention what it was, its error and the most that is right: of prompts of so many tokens
    of some sequences, then of the next token of each."""
    tokens = torch.Generator().manual_seed(rows)
    vocabulary = engine.program.params["lm_head.weight"].sizes[0]
    decoder = Decoder(engine, rows, prompt + 8)
    for entry, each in (("prefill", prompt), ("decode", 1)):
        at = Tokens.chunk([each] * rows, decoder.lengths)
        ids = torch.randint(0, vocabulary, (rows * each,), generator=tokens)
        call = engine.call(entry, at, ids)
        caches = decoder.caches
        queries, attended = torch.empty(0), call.schedule.rows[0]
        for row in call.schedule.rows:
            if row.host >= 0:
                continue
            launch = Launched(engine, call, caches, row)
            template, fixed = launch.kernel.template, launch.kernel.constants
            label = f"{entry}, {len(at)} tokens: {template}"
            if template in ("gemv", "gemm"):
                yield label, product_error(launch, weights), launch.limit("y")
                continue
            if template == "project":
                yield label, projection_error(launch, weights, at), launch.limit("q")
                continue
            if template == "attend":
                shape = len(at), fixed["H"] * fixed["G"], fixed["D"]
                stride, width = int(launch.number("q_stride")), shape[1] * shape[2]
                flat = launch.tensor("q", (len(at) - 1) * stride + width)
                queries = flat.as_strided((len(at), width), (stride, 1)).reshape(shape)
            launch.run()
            if template == "combine" or template == "attend" and not fixed["PARTS"]:
                where = row if template == "attend" else attended  # the launch that has the cache
                yield label, attention_error(launch, queries, cached(caches, where, rows), at), launch.limit("out")
            attended = row if template == "attend" else attended
        decoder.lengths = [n + each for n in decoder.lengths]
    for cache in decoder.caches.values():
        cache.free()
