"""Attention written out in a plain module, in the spellings that people use: raised and right; what is not attention, refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elision
from elision.errors import UnsupportedModel
from elision.frontend.capture import capture
from elision.frontend.eager import fuse_attention
from elision.frontend.normalise import normalise
from elision.frontend.structure import is_attention
from elision.ir.mask import Mask
from elision.runtime.model import Model as Compiled

WIDTH, HEADS, DIM, PLACES = 32, 4, 8, 48
SLOPES = torch.tensor([0.9, 0.31, 0.2, 0.07])
Spelling = Callable[["Attention", Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, spelling: Spelling, keys: int) -> None:
        super().__init__()
        self.spelling, self.keys = spelling, keys
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, keys * DIM), nn.Linear(WIDTH, keys * DIM)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.learned = nn.Parameter(torch.randn(HEADS, 2 * PLACES))
        self.register_buffer("slopes", SLOPES)
        self.register_buffer("table", torch.ones(1, 1, PLACES, PLACES).tril())
        self.register_buffer("hole", torch.ones(PLACES, PLACES).tril())
        self.hole[45, 2] = 0
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.spelling(self, x).reshape(*x.shape[:2], WIDTH))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, H, T, D]`` each."""
        q, k, v = (f(x).view(*x.shape[:2], -1, DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        return q, k, v


def future(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).triu(1)


def distance(t: int) -> Tensor:
    return torch.arange(t)[None, :] - torch.arange(t)[:, None]


def plain(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    scores = q @ k.transpose(-2, -1) / math.sqrt(DIM)
    return (a.drop(scores.masked_fill(future(x.shape[1]), float("-inf")).softmax(-1)) @ v).transpose(1, 2)


def unscaled_bidirectional(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    return (torch.matmul(q, k.mT).softmax(-1) @ v).transpose(1, 2)


def table(a: Attention, x: Tensor) -> Tensor:
    q, k, v = (y.view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for y in a.qkv(x).split(WIDTH, dim=2))
    t = x.shape[1]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    scores = scores.masked_fill(a.table[:, :, :t, :t] == 0, float("-inf"))
    return (F.softmax(scores.float(), dim=-1).type_as(v) @ v).transpose(1, 2).contiguous()


def packed(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.qkv(x).reshape(*x.shape[:2], 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
    q = q * DIM**-0.5
    scores = (q @ k.transpose(-2, -1)).masked_fill(future(x.shape[1]), -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def merged(a: Attention, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = (y.reshape(b * HEADS, t, DIM) for y in a.heads(x))
    alibi = (a.slopes[:, None, None] * torch.arange(t)).repeat(b, 1, 1)
    scores = torch.baddbmm(alibi, q, k.transpose(1, 2), beta=1.0, alpha=0.3).view(b, HEADS, t, t)
    hidden = torch.zeros(t, t).masked_fill(future(t), torch.finfo(torch.float32).min)
    return torch.bmm((scores + hidden).softmax(-1).view(b * HEADS, t, t), v).view(b, HEADS, t, DIM).transpose(1, 2)


def einsums(a: Attention, x: Tensor) -> Tensor:
    q, k, v = (y.transpose(1, 2) for y in a.heads(x))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * 0.3
    scores = torch.where(future(x.shape[1]), torch.full_like(scores, -1e9), scores)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1, dtype=torch.float32), v)


def repeated(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], HEADS, x.shape[1], DIM) for y in (k, v))
    return ((q * 0.3 @ k.mT).masked_fill(future(x.shape[1]), -torch.inf).softmax(-1) @ v).transpose(1, 2)


def grouped(a: Attention, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = a.q(x).view(b, t, 2, 2, DIM), a.k(x).view(b, t, 2, DIM), a.v(x).view(b, t, 2, DIM)
    scores = torch.einsum("btkgd,bskd->bkgts", q, k) * 0.3
    scores = scores + (a.slopes.view(2, 2, 1, 1) * distance(t)).masked_fill(future(t), -torch.inf)
    return torch.einsum("bkgts,bskd->btkgd", scores.softmax(-1), v)


def one_key_head(a: Attention, x: Tensor) -> Tensor:
    b, t, _ = x.shape
    q = a.q(x).view(b, t, HEADS, DIM).transpose(1, 2)
    scores = (q @ a.k(x).unsqueeze(1).mT / DIM**0.5).masked_fill(future(t), -torch.inf)
    return (scores.softmax(-1) @ a.v(x).unsqueeze(1)).transpose(1, 2)


def capped_window(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    scores = torch.tanh(q @ k.mT * 0.5 / 3.0) * 3.0
    near = (distance(x.shape[1]) <= 0) & (distance(x.shape[1]) > -6)
    return (scores.masked_fill(~near, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def sinks(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    scores = (q @ k.mT * 0.3).masked_fill(future(x.shape[1]), -1e9)
    scores = torch.cat([scores, a.sinks.view(1, -1, 1, 1).expand(x.shape[0], -1, x.shape[1], 1)], -1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)


def alibi_by_distance(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    scores = q @ k.mT * 0.3 - a.slopes[:, None, None] * distance(x.shape[1]).abs()
    return (scores.masked_fill(future(x.shape[1]), -torch.inf).softmax(-1) @ v).transpose(1, 2)


def alibi_as_mask(a: Attention, x: Tensor) -> Tensor:
    t = x.shape[1]
    bias = (a.slopes[:, None, None] * torch.arange(t)).masked_fill(future(t), -torch.inf)
    return F.scaled_dot_product_attention(*a.heads(x), attn_mask=bias[None].expand(x.shape[0], -1, -1, -1)).transpose(1, 2)


def one_slope(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    scores = q @ k.mT * 0.3 + (0.2 * distance(x.shape[1]))[None, None]
    return (scores.masked_fill(future(x.shape[1]), -torch.inf).softmax(-1) @ v).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, spelling: Spelling, keys: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = nn.ModuleList(Attention(spelling, keys) for _ in range(3))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(3))
        self.head = nn.Linear(WIDTH, 50, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                p.data = torch.randn(p.shape) * 2 * p.shape[-1] ** -0.5

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for norm, attention, mlp in zip(self.norms, self.attention, self.mlp, strict=True):
            x = x + attention(norm(x))
            x = x + mlp(x)
        return self.head(x)


#: Spelling to (key heads, mask, slopes).
RIGHT: dict[Spelling, tuple[int, Mask, Tensor | None]] = {
    plain: (4, Mask("causal"), None),
    unscaled_bidirectional: (4, Mask("full"), None),
    table: (4, Mask("causal"), None),
    packed: (4, Mask("causal"), None),
    merged: (4, Mask("causal"), SLOPES),
    einsums: (4, Mask("causal"), None),
    repeated: (2, Mask("causal"), None),
    grouped: (2, Mask("causal"), SLOPES),
    one_key_head: (1, Mask("causal"), None),
    capped_window: (4, Mask("window", 6), None),
    sinks: (4, Mask("causal"), None),
    alibi_by_distance: (4, Mask("causal"), SLOPES),
    alibi_as_mask: (4, Mask("causal"), SLOPES),
    one_slope: (4, Mask("causal"), torch.full((4,), 0.2)),
}


@cache
def model(spelling: Spelling) -> Model:
    return Model(spelling, RIGHT[spelling][0] if spelling in RIGHT else HEADS).eval()


@cache
def compiled(spelling: Spelling) -> Compiled:
    return elision.compile(model(spelling))


@pytest.mark.parametrize("spelling", RIGHT, ids=lambda f: f.__name__)
def test_a_written_out_attention_is_raised(spelling: Spelling) -> None:
    heads, mask, slopes = RIGHT[spelling]
    source = model(spelling)
    found = compiled(spelling)
    assert set(found.coverage["entries"].values()) == {0}
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = source(ids)
    assert float((found(ids)[0] - want).abs().max()) <= 1e-5 * float(want.abs().max())
    calls = [dict(v.attr("env", ())).get("mask") for v in found.program.entries["score"].calls()]
    assert {m for m in calls if m is not None} == {mask}
    assert all(s.heads == heads for s in found.program.states.values())
    names = [n for n in found.weights if n.startswith("alibi")]
    assert len(names) == (slopes is not None)
    if slopes is not None:
        torch.testing.assert_close(found.weights[names[0]], slopes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spelling", [s for s, (_, m, _) in RIGHT.items() if m.kind != "full"], ids=lambda f: f.__name__)
def test_it_generates_like_the_module(spelling: Spelling) -> None:
    source = model(spelling)
    want = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(1))
    found = compiled(spelling).generate(want, max_new_tokens=20)
    with torch.no_grad():
        for _ in range(20):
            want = torch.cat((want, source(want)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(found, want)


# --- what looks like it and is not ---


def masked_after_softmax(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    return ((q @ k.mT).softmax(-1).masked_fill(future(x.shape[1]), 0.0) @ v).transpose(1, 2)


def far_scores_are_zero(a: Attention, x: Tensor) -> Tensor:
    """A window of 20 within which nothing shows it; scores beyond it are not hidden."""
    q, k, v = a.heads(x)
    scores = (q @ k.mT).masked_fill(distance(x.shape[1]) < -20, 0.0)
    return (scores.masked_fill(future(x.shape[1]), -torch.inf).softmax(-1) @ v).transpose(1, 2)


def learned_bias(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    scores = q @ k.mT + a.learned[:, distance(x.shape[1]).clamp(-15, 15) + 15]
    return (scores.masked_fill(future(x.shape[1]), -torch.inf).softmax(-1) @ v).transpose(1, 2)


def hole_in_the_table(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    scores = (q @ k.mT).masked_fill(a.hole[: x.shape[1], : x.shape[1]] == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def bent_alibi(a: Attention, x: Tensor) -> Tensor:
    """Linear as far as 35 tokens."""
    q, k, v = a.heads(x)
    scores = q @ k.mT + a.slopes[:, None, None] * distance(x.shape[1]).clamp(min=-35)
    return (scores.masked_fill(future(x.shape[1]), -torch.inf).softmax(-1) @ v).transpose(1, 2)


def by_content(a: Attention, x: Tensor) -> Tensor:
    """Keys that a token may hide."""
    q, k, v = a.heads(x)
    scores = (q @ k.mT).masked_fill(x[:, None, None, :, 0] > 1.0, -1e9)
    return (scores.masked_fill(future(x.shape[1]), -torch.inf).softmax(-1) @ v).transpose(1, 2)


def hotter_with_position(a: Attention, x: Tensor) -> Tensor:
    q, k, v = a.heads(x)
    scores = (q @ k.mT) * (1.0 + 0.01 * torch.arange(x.shape[1])[:, None])
    return (scores.masked_fill(future(x.shape[1]), -torch.inf).softmax(-1) @ v).transpose(1, 2)


WRONG = [
    masked_after_softmax, far_scores_are_zero, learned_bias, hole_in_the_table, bent_alibi, by_content, hotter_with_position,
]  # fmt: skip


@pytest.mark.parametrize("spelling", WRONG, ids=lambda f: f.__name__)
def test_other_attention_is_refused(spelling: Spelling) -> None:
    with pytest.raises(UnsupportedModel, match="written out|a mask is never dropped|a learned bias"):
        elision.compile(model(spelling))


def test_a_proposal_that_does_not_agree_leaves_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(model(plain))
    graph = normalise(captured.graph)
    before = len(graph.nodes)
    monkeypatch.setattr("elision.frontend.eager.close", lambda *_: False)
    assert not fuse_attention(replace(captured, graph=graph))
    assert len(graph.nodes) == before and not any(is_attention(n) for n in graph.nodes)
