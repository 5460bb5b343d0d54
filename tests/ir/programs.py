"""A tiny Llama-like program built by hand, without the frontend."""

from __future__ import annotations

import torch

from elision.ir.mask import Mask
from elision.ir.program import Program
from elision.ir.states import KV, Dense, Float, Segment
from elision.ir.types import DTYPES, Axis, Tensor
from elision.ir.value import Builder, Env, Graph, Value
from elision.passes.cache import InsertCache

T = Axis("t")
Weights = dict[str, torch.Tensor]


def tiny_llama(
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 64,
    inter: int | None = None,
    dtype: str = "f64",
    mask: Mask | None = None,
    random: bool = True,
) -> tuple[Program, Weights]:
    """A causal decoder with RMS norms, RoPE, grouped heads, SwiGLU and a tied head, with caches inserted; and random weights
    (none unless ``random``)."""
    program, weights = tiny_scorer(layers, hidden, heads, kv_heads, vocab, inter, dtype, mask, random)
    InsertCache().apply(program)
    return program, weights


def tiny_scorer(
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 64,
    inter: int | None = None,
    dtype: str = "f64",
    mask: Mask | None = None,
    random: bool = True,
) -> tuple[Program, Weights]:
    """As `tiny_llama`, freshly raised: just `score`, without caches."""
    inter, dim, mask = inter or 2 * hidden, hidden // heads, mask or Mask()
    templates = {g.name: g for g in (_attn(hidden, heads, kv_heads, dim, dtype), _mlp(hidden, inter, dtype))}
    shapes = {"embed": (vocab, hidden), "norm": (hidden,)}
    program = Program("tiny", {}, templates=templates)
    b = Builder("score", templates)
    table = b.param("embed", Tensor((vocab, hidden), dtype))
    h: Value = b.add("embed", b.input("ids", Tensor((T,), "i64")), table, name="h")
    for i in range(layers):
        for part, graph in templates.items():
            operands = []
            for v in graph.inputs[1:]:
                name = graph.names[v] if graph.names[v] == "inv_freq" else f"{i}.{graph.names[v]}"
                shapes[name] = v.tensor.axes  # type: ignore[assignment]
                operands.append(b.param(name, v.tensor))
            env = {"env": (("mask", mask),)} if part == "attn" else {}
            h = b.add("call", h, *operands, target=part, label=f"{i}.{part}", name="h", **env)
    h = b.add("norm", h, b.param("norm", Tensor((hidden,), dtype)), kind="rms", eps=1e-6)
    program.entries["score"] = b.build(b.add("linear", h, table, name="logits"))
    program.params = {n: Tensor(s, dtype) for n, s in shapes.items()}
    causal = mask.kind != "full"
    program.meta = {"outputs": ("logits",), "vocab": vocab, "hidden": hidden, "dtype": dtype, "positions": 512, "causal": causal}
    return program, _weights(shapes, dtype) if random else {}


def _attn(hidden: int, heads: int, kv_heads: int, dim: int, dtype: str) -> Graph:
    b = Builder("attn")
    h = b.input("h", Tensor((T, hidden), dtype))
    norm = b.input("attn_norm", Tensor((hidden,), dtype))
    q, k, v, o = (
        b.input(n, Tensor(s, dtype))
        for n, s in {
            "q": (heads * dim, hidden),
            "k": (kv_heads * dim, hidden),
            "v": (kv_heads * dim, hidden),
            "o": (hidden, heads * dim),
        }.items()
    )
    inv_freq = b.input("inv_freq", Tensor((dim // 2,), dtype))
    x = b.add("norm", h, norm, kind="rms", eps=1e-6)
    query = b.add("rope", b.add("view", b.add("linear", x, q), shape=(heads, dim)), inv_freq, style="half")
    key = b.add("rope", b.add("view", b.add("linear", x, k), shape=(kv_heads, dim)), inv_freq, style="half")
    value = b.add("view", b.add("linear", x, v), shape=(kv_heads, dim))
    encoding = Float(dtype)
    cache = b.add("fresh", key, value, type=KV(kv_heads, dim, dim, (Segment(Dense(), encoding, encoding),)))
    found = b.add("attend", query, cache, mask=Env("mask"), scale=dim**-0.5)
    out = b.add("linear", b.add("view", found, shape=(heads * dim,)), o)
    return b.build(b.add("map", h, out, expr="x0 + x1", name="h"))


def _mlp(hidden: int, inter: int, dtype: str) -> Graph:
    b = Builder("mlp")
    h = b.input("h", Tensor((T, hidden), dtype))
    norm = b.input("mlp_norm", Tensor((hidden,), dtype))
    gate, up = (b.input(n, Tensor((inter, hidden), dtype)) for n in ("gate", "up"))
    down = b.input("down", Tensor((hidden, inter), dtype))
    x = b.add("norm", h, norm, kind="rms", eps=1e-6)
    wide = b.add("map", b.add("linear", x, gate), b.add("linear", x, up), expr="silu(x0) * x1")
    return b.build(b.add("map", h, b.add("linear", wide, down), expr="x0 + x1", name="h"))


def _weights(shapes: dict[str, tuple[int, ...]], dtype: str) -> Weights:
    generator = torch.Generator().manual_seed(0)
    found: Weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "inv_freq":
            x = 10000.0 ** -(torch.arange(shape[0], dtype=torch.float64) / shape[0])
        elif name.endswith("norm"):
            x = 1 + 0.1 * x
        else:
            x = x * (2.0 if name == "embed" else shape[-1] ** -0.5)
        found[name] = x.to(DTYPES[dtype])
    return found
