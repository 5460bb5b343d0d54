"""Projections in one launch under Triton's interpreter: queries, and what the cache has then, against the ops one after the
other."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
import triton
from caches import NODES, arrays, axis, blocks, fill, kv, trees
from test_caches import same
from test_linear import K, weight, width
from test_programs import compiled

from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.forms import form as form_of
from elision.codegen.triton.project import project
from elision.codegen.triton.project_rules import projections
from elision.ir.flatten import flat_entries
from elision.ir.ops.dense import norm, rope
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.states import Float, Int, Ring, Slots
from elision.ir.store import KVStore
from elision.ir.tokens import Tokens

F32, BYTES = Float("f32"), Int(8, "channel", 16)


def projected(
    format: str = "f32", heads: int = 4, dim: int = 16, encoding: Float | Int = F32, slots: Slots | None = None,
    style: str = "half", turns: int | None = None, head_norm: str = "", drafted: bool = False, many: bool = False,
    head_offset: float = 0.5, whole: bool = False, bias: bool = False, one: bool = False, normed: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor, list[KVStore]]:  # fmt: skip
    """The queries that the kernel gives and those of the ops; the caches of the ops and of the kernel. ``turns`` pairs turn;
    ``one``: one weight for all."""
    stores = [KVStore(kv(2, dim, dim, encoding, slots, **({"keyed_by": "explicit"} if slots else {})), 2, 40) for _ in range(2)]
    lengths = [9, 4]
    for store in stores:
        fill(store, lengths)
    tokens = trees(4, [5, 2], lengths) if drafted else Tokens.chunk([3, 2] if many else [1, 1], lengths)
    seed, t = torch.Generator().manual_seed(1), len(tokens)
    k = width(format)
    x = torch.randn(t, k, generator=seed).to(dtype)
    gain, gq, gk = (torch.randn(n, generator=seed).to(dtype) * 0.1 for n in (k, dim, dim))
    rows = [heads * dim, 2 * dim, 2 * dim]
    firsts = [2 * rows[1], rows[1], 0] if one else [0, 0, 0]
    made = [weight(format, sum(rows), 0, k)] * 3 if one else [weight(format, n, i, k) for i, n in enumerate(rows)]
    added = [torch.randn(len(m[2]), generator=seed).to(dtype) for m in made]
    added = [added[0]] * 3 if one else added
    r = dim // 2 if turns is None else turns
    freq = 100.0 ** (-torch.arange(r) / max(r, 1))

    wide = norm(x.double(), gain.double(), kind="rms", eps=1e-5, offset=1.0) if normed else x.double()
    found = []
    for i, (n, first) in enumerate(zip(rows, firsts, strict=True)):
        y = wide @ made[i][2][first : first + n].T + (added[i][first : first + n].double() if bias else 0.0)
        y = y.to(dtype).view(t, -1, dim)
        if head_norm and i < 2:
            y = norm(y, (gq, gk)[i], kind="rms", eps=1e-5, offset=head_offset, cast=head_norm)
        found.append(rope(y, freq, style=style, scale=1.25, at=tokens) if r and i < 2 else y)
    stores[0].append(tokens, *found[1:])

    type, at, index, enc = stores[1].type, axis(tokens), stores[1].index, encoding
    ring = isinstance(slots, Ring)
    (p0, form, _), (p1, *_), (p2, *_) = made
    q = torch.full((t, heads, dim), torch.nan, dtype=dtype)
    bn, bm = triton.next_power_of_2(dim) if whole else 8, 4 if many else 1
    turned = (freq, 1.25) if r else (None, None)
    project[((heads + 4) * -(-dim // bn), -(-t // bm))](
        q, x, gain if normed else None, 1e-5, *p0, *p1, *p2, *(added if bias else [None] * 3),
        *((gq, gk) if head_norm else (None, None)), 1e-5, *turned, t, at["row"], at["pos"], at.get("node"), at["start"],
        *arrays(stores[1], -1 if drafted else 0)[:4], stores[1].pos, index["node_pos"], index["node_live"], stores[1].len["k"],
        index.get("count"), blocks(stores[1], -1 if drafted else 0), stores[1].pos.shape[2], slots.sinks if ring else 0,
        stores[1].segments[0].slots - slots.sinks if ring else 0,
        K=k, FORMAT=form, NORM=normed, OFFSET=1.0, HEADS=heads, H=2, D=dim, LISTS=stores[1].pos.shape[1],
        FIRST_Q=firsts[0], FIRST_K=firsts[1], FIRST_V=firsts[2], BIAS=bias, HEAD_NORM=bool(head_norm),
        HEAD_GAIN=bool(head_norm), HEAD_OFFSET=head_offset, EARLY=head_norm == "early", R=r, STYLE=style, FORM_K=form_of(enc),
        FORM_V=form_of(enc), DRAFTED=drafted, RING=ring, NODES=NODES, BM=bm, BN=bn, BK=32 if k == K else 256,
    )  # fmt: skip
    if not drafted:  # `advance` counts
        for store in stores:
            for name in ("k", "v"):
                store.len[name].zero_()
            store.index.get("count", torch.zeros(1)).zero_()
    assert type.dim == dim
    return q, found[0], stores


def check(near: float = 1e-4, **options: Any) -> None:
    q, expected, stores = projected(**options)
    assert torch.allclose(q.double(), expected.double(), rtol=near, atol=near * float(expected.abs().max()))
    assert same(*stores, codes=1, near=near)


CASES: list[dict[str, Any]] = [
    {},
    {"many": True},
    {"style": "interleaved", "many": True},
    {"style": "parted"},
    {"style": "parted", "whole": True, "head_norm": "late", "many": True},
    {"turns": 0, "normed": False, "one": True, "bias": True},
    {"turns": 5, "whole": True, "bias": True, "many": True},
    {"dim": 24, "whole": True, "style": "interleaved", "turns": 3, "heads": 2},
    {"head_norm": "early", "whole": True, "drafted": True, "many": True},
    {"encoding": BYTES, "whole": True, "drafted": True, "one": True},
    {"encoding": Int(8, "channel", 4), "whole": True, "many": True, "slots": Ring(6, 2, 12)},
    {"encoding": Float("bf16"), "slots": Ring(6, 2, 12)},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()) or "plain")
def test_queries_keys_and_values(options: dict[str, Any]) -> None:
    check(**options)


FORMATS = ["bf16", "f16", "int8(group=32)", "int8(group=row)", "int4(group=16)", "Q8_0", "Q4_0", "Q4_1", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("format", FORMATS)
def test_every_format(format: str) -> None:
    check(format=format, many=format in ("int4(group=16)", "f16"), head_norm="late", whole=True)


@pytest.mark.parametrize("head_norm", ["early", ""])
def test_activations_are_rounded_where_ops_round(head_norm: str) -> None:
    """Bit for bit but where sums of float32 and of float64 are on two sides of a tie. Nearly of bfloat16, which Triton's
    interpreter cuts, and of rotations, which kernels compute in float32."""
    options: dict[str, Any] = dict(format="bf16", head_norm=head_norm, head_offset=0.0, whole=True)
    q, expected, stores = projected(turns=0, encoding=Float("f16"), dtype=torch.float16, **options)
    assert same(*stores, near=2e-2) and float((q == expected).float().mean()) > 0.95
    check(5e-2, dtype=torch.bfloat16, **options)


@pytest.mark.nightly
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("encoding", [F32, BYTES, Int(8, "channel", 8)], ids=str)
@pytest.mark.parametrize("style", ["half", "interleaved", "parted"])
@pytest.mark.parametrize("head_norm", ["", "late", "early"])
def test_all_together(many: bool, drafted: bool, encoding: Float | Int, style: str, head_norm: str) -> None:
    for turns in (8, 3):
        check(
            many=many, drafted=drafted, encoding=encoding, style=style, head_norm=head_norm, turns=turns, whole=True,
            format="Q4_1" if many else "int8(group=16)",
        )  # fmt: skip


@pytest.mark.parametrize(
    "family,passes,changes,columns",
    [
        ("LlamaConfig", (), {}, 4),
        ("LlamaConfig", ("insert-cache:dtype=int8",), {}, 16),  # whole heads: a scale is of all its channels
        ("GPT2Config", (), {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}, 4),
        ("StableLmConfig", (), {}, 16),  # not all channels turn
        ("Gemma3TextConfig", ("int4:group=32",), {"head_dim": 16}, 16),  # heads are normalised
        ("Olmo2Config", (), {}, 0),  # norms of all heads together
    ],
)
def test_what_is_one_launch(family: str, passes: tuple[str, ...], changes: dict[str, Any], columns: int) -> None:
    code = plan_program(compiled(family, passes, **changes).program)
    for entry in ("step", "decode"):
        assert not code.hosts[entry]
        for shape in ("one", "few", "some"):
            found = [code.kernels[r.kernel] for r in code.schedules[entry][shape].rows if r.host < 0]
            names = [k.template for k in found]
            fused = columns > 0 and shape != "some"
            assert names.count("project") == fused and names.count("append") == (not fused) and not (fused and "rope" in names)
            assert shape != "one" or [k.constants["BN"] for k in found if k.template == "project"] == [columns][:fused]


@cache
def _text() -> str:
    return print_program(compiled("Qwen3Config", head_dim=16).program)


@pytest.mark.parametrize(
    "edits",
    [
        {r"(norm\(x_1, k_norm, cast='late', eps=)1e-06": r"\g<1>1e-05"},
        {r"(rope\(norm_2, inv_freq, scale=)1.0": r"\g<1>2.0"},
        {r"linear\(norm, v_proj\)": "linear(h, v_proj)"},
        {r"(v_proj(\.weight')?[:,] f32\[16, 32\])": r"\1 in Q8_0"},
        {r"(_proj(\.weight')?[:,] f32\[(16|32), 32\])": r"\1 in Q8_0", r"linear\(norm, (q|k|v)_proj": r"\g<0>, a8=32"},
        {r"x_3 = view\(o,": "o_9 = map(o, x_2, expr='x0 + x1')\n    x_3 = view(o_9,"},  # values are read again
        {r"o = attend\(rope,": "o_9 = map(rope, expr='x0 + x0')\n    o = attend(o_9,"},  # queries are of another form
        {
            r"kv_1 = append": "o_9 = map(rope, expr='x0 + x0')\n    kv_1 = append",  # queries are read before
            r"x_3 = view\(o,": "o_8 = map(o, o_9, expr='x0 + x1')\n    x_3 = view(o_8,",
        },
    ],
    ids=range(8),
)
def test_what_differs_is_not_one_launch(edits: dict[str, str]) -> None:
    text = _text()
    assert len(projections(flat_entries(parse_program(text))["step"])) == 1
    for old, new in edits.items():
        text, times = re.subn(old, new, text)
        assert times
    assert not projections(flat_entries(parse_program(text))["step"])


def test_parts_of_one_weight_begin_where_they_are_sliced() -> None:
    program = compiled("GPT2Config", n_embd=32, n_layer=1, n_head=2, n_positions=64).program
    (found,) = projections(flat_entries(program)["step"]).values()
    assert [part.first for part in (found.q, found.k, found.v)] == [0, 32, 64]
