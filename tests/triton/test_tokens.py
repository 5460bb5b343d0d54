"""Tokens that are merged or left out, under Triton's interpreter: kernels against their ops, encoders and prompts of decoders
against the reference interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_forward import forwards, randn
from test_forward import given as inputs
from test_generate import both, on_gpu
from test_programs import PROMPTS, compiled, engine

from elision.codegen.triton.looked import looks, received
from elision.codegen.triton.merge import compact, joined, merge
from elision.codegen.triton.rank import halves, importance, remain, settle, stand, uniform
from elision.codegen.triton.select import join_rest, join_similar, stays
from elision.codegen.triton.similar import nearest, unit
from elision.ir.kept import stay, twins
from elision.ir.mask import Mask
from elision.ir.op import lookup
from elision.ir.ops import axes, matching, prompt, ranking
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor
from elision.ir.value import Builder, Value
from elision.runtime.cuda.decode import Decoder

AT = Tokens.chunk([21, 0, 1, 8], [0, 0, 0, 5])
START = torch.tensor([0, 21, 21, 22, 30])
FULL, SIZES = Mask("full"), dict(H=2, G=3, GP=4, D=20, DP=32)


def choosing(op: str, *types: Tensor, **attrs: Any) -> Value:
    """A value of an op, for what is known of it without its operands."""
    b = Builder("g", {})
    return b.add(op, *(b.input(f"x{i}", t) for i, t in enumerate(types)), **attrs)  # type: ignore[no-any-return]


T, K = Tensor((Axis("t"),), "f32"), Tensor((Axis("t"), 2, 4), "f32")


def kept(value: Value, at: Tokens) -> torch.Tensor:
    """Where the sequences begin on the axis of what stays."""
    counts, pos = torch.bincount(at.row, minlength=at.rows).tolist(), at.pos.tolist()
    spans = [pos[sum(counts[: i + 1]) - 1] - pos[sum(counts[:i])] + 1 if n else 0 for i, n in enumerate(counts)]
    return torch.tensor([0] + [stay(value, n, span) for n, span in zip(counts, spans, strict=True)]).cumsum(0)


LENGTHS = st.lists(st.integers(0, 13), min_size=1, max_size=4).filter(any)
SHARE = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])


@given(LENGTHS, SHARE, st.integers(0, 4), st.integers(0, 3), st.booleans())
def test_how_many_stay_is_known(lengths: list[int], share: float, n: int, protect: int, merges: bool) -> None:
    """As many as the ops leave, of sequences at positions with gaps."""
    at = Tokens.chunk(lengths, [3] * len(lengths))
    at = Tokens(at.row, at.pos * 2, at.rows)
    score, k = randn(len(at), seed=n), randn(len(at), 2, 4, seed=n)
    values = [
        (choosing("match", K, n=n, protect=protect), (k,)), (choosing("match", K, share=share * 0.5, protect=protect), (k,)),
        (choosing("fuse", T, keep=share or 1.0, protect=protect), (score,)),
        (choosing("prune", T, K, keep=share or 1.0, similar=0.5, protect=protect), (score, k)),
    ]  # fmt: skip
    for value, operands in values:
        assign = lookup(value.op).body(*operands, **dict(value.attrs), at=at)
        left = torch.bincount(axes.clusters(assign, axis="m", at=at)[1].row, minlength=at.rows)
        assert kept(value, at).diff().tolist() == left.tolist(), value.op
    value = choosing("foremost", T, keep=share or 1.0, first=1 + protect, last=1 + n)
    mask = lookup("foremost").body(score, **dict(value.attrs), at=at)
    assert kept(value, at).diff().tolist() == torch.bincount(at.row[mask], minlength=at.rows).tolist()


@pytest.mark.parametrize(
    "heads,n,share,protect", [(False, 5, 0.0, 1), (True, 0, 0.3, 0), (True, 100, 0.0, 3), (False, 0, 0.0, 1)]
)
def test_match(heads: bool, n: int, share: float, protect: int) -> None:
    k = randn(30, 2, 20)
    k[10] = k[4]  # equal ones: the first goes
    k[13] = k[8] = k[7]  # and to the first
    value = choosing("match", K, n=n, share=share, protect=protect, heads=heads)
    width = 40 if heads else 20
    rows, best, to, assign = torch.zeros(30, width), torch.zeros(30), torch.zeros(30, dtype=torch.int64), torch.full((30,), -1)
    unit[(30,)](rows, k, 40, H=2, D=20, HP=2, DP=32, FORM="heads" if heads else "mean")
    nearest[(3, 4)](best, to, rows, None, START, W=width, SIDED=False, BM=16, BN=4, BK=32)
    join_similar[(4,)](assign, best, to, START, kept(value, AT), SKIP=protect, BN=16)
    assert torch.equal(assign, matching.match(k, n=n, share=share, protect=protect, heads=heads, at=AT))


@pytest.mark.parametrize(
    "keep,protect,dtype", [(0.4, 1, torch.float32), (0.9, 0, torch.bfloat16), (1.0, 2, torch.float32)], ids=str
)
def test_fuse_and_foremost(keep: float, protect: int, dtype: torch.dtype) -> None:
    score = randn(30).to(dtype)
    score[[3, 9]], score[22:] = 1.0, torch.tensor([-0.0, 0.0] * 4, dtype=dtype)  # equal ones: the first stay
    value, assign = choosing("fuse", T, keep=keep, protect=protect), torch.full((30,), -1)
    join_rest[(4,)](assign, score, START, kept(value, AT), FIRST=protect, BN=16)
    assert torch.equal(assign, matching.fuse(score, keep=keep, protect=protect, at=AT))
    value, mask = choosing("foremost", T, keep=keep, first=1 + protect, last=2), torch.zeros(30, dtype=torch.uint8)
    stays[(4,)](mask, score, START, kept(value, AT), FIRST=1 + protect, LAST=2, BN=16)
    assert torch.equal(mask.bool(), prompt.foremost(score, keep=keep, first=1 + protect, last=2, at=AT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_became_one(dtype: torch.dtype) -> None:
    assign = matching.fuse(randn(30), keep=0.3, at=AT)
    expected, of = axes.clusters(assign, axis="m", at=AT)
    n, to = len(expected), torch.searchsorted(of.row, torch.arange(5))
    for chosen in (assign, (assign == torch.arange(30)).to(torch.uint8)):
        index, pos, place = (torch.full((m,), -1) for m in (n, n, 30))
        compact[(4,)](index, pos, place, chosen, AT.pos, START, to, ASSIGN=chosen is assign, BN=16)
        assert torch.equal(index, expected) and torch.equal(pos, of.pos)
    where = torch.full((30,), -1)
    joined[(2,)](where, assign, place, 30, BLOCK=16)
    assert torch.equal(where, axes.joined(assign, expected))
    x, weight = randn(30, 20).to(dtype), randn(30, seed=1).abs().to(dtype)
    y = torch.full((n, 20), torch.nan, dtype=dtype)
    for weighted in (False, True):
        merge[(n, 2)](y, x, assign, weight if weighted else None, index, of.row, START, K=20, WEIGHTED=weighted, BN=8, BK=16)
        exact = axes.merge(*(v.double() if v.is_floating_point() else v for v in (x, assign, weight)), index)
        exact = exact if weighted else axes.collect(x.double(), assign, index)
        assert torch.allclose(y.double(), exact, *([1e-5, 1e-5] if dtype == torch.float32 else [1e-2, 1e-2]))


@pytest.mark.parametrize("sized", [False, True])
def test_what_the_first_token_looks_at(sized: bool) -> None:
    q, k, size = randn(30, 6, 20), randn(30, 2, 20, seed=1), 1 + randn(30, seed=2).abs() if sized else None
    score = looked(q, k, size, who=dict(FIRST=1, LAST=0), scale=0.3, least=1e-19)
    expected = matching.regard(q, k, *([] if size is None else [size]), scale=0.3, at=AT)
    assert torch.allclose(score, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "mask,last,more",
    [
        (Mask("causal"), 1, {}), (Mask("window", 6), 3, {"softcap": 2.0, "slopes": randn(6, seed=3)}),
        (Mask("causal"), 20, {"sinks": randn(6, seed=4)}),
    ],
    ids=["last", "window", "many"],
)  # fmt: skip
def test_what_the_last_tokens_look_at(mask: Mask, last: int, more: dict[str, Any]) -> None:
    q, k = randn(30, 6, 20), randn(30, 2, 20, seed=1)
    score = looked(q, k, None, who=dict(FIRST=0, LAST=last), scale=0.3, mask=mask, **more)
    extras = [n for n in ("sinks", "slopes") if n in more]
    expected = prompt.received(
        q, k, *(more[n] for n in extras), mask=mask, scale=0.3, softcap=more.get("softcap"), extras=tuple(extras), last=last,
        at=AT,
    )  # fmt: skip
    assert torch.allclose(score, expected, rtol=1e-4, atol=1e-6)


def looked(
    q: torch.Tensor, k: torch.Tensor, size: torch.Tensor | None, who: dict[str, int], scale: float, least: float = 0.0,
    mask: Mask = FULL, softcap: float = 0.0, slopes: Any = None, sinks: Any = None,
) -> torch.Tensor:  # fmt: skip
    """What tokens receive."""
    lse, score = torch.full((30, 6), torch.nan), torch.full((30,), torch.nan)
    fixed = SIZES | dict(MASK=mask.kind, SOFTCAP=softcap > 0, SLOPES=slopes is not None, SIZED=size is not None) | who
    rest = scale, softcap, mask.size, mask.sinks
    looks[(5, 8)](lse, q, 120, k, 40, AT.pos, START, slopes, sinks, size, *rest, SINKS=sinks is not None, BM=16, BN=16, **fixed)
    received[(2, 4)](
        score, q, 120, k, 40, AT.pos, START, slopes, size, lse, None, None, *rest, least, WEIGHTED=False, BM=16, BN=16, **fixed
    )
    return score


@pytest.mark.parametrize("rounds,keep,similar", [(1, 0.5, 0.5), (3, 0.6, 1.0), (14, 0.8, 0.3)])
def test_page_rank_and_what_goes_by_it(rounds: int, keep: float, similar: float) -> None:
    """Some sequences settle before the last round, others do not."""
    q, k, at = randn(30, 6, 20), randn(30, 2, 20, seed=1), AT
    k[:, 1] *= 2  # some heads are too uneven to count
    rest, lse = (0.2, 0.0, 0, 0), torch.full((30, 6), torch.nan)
    fixed = SIZES | dict(MASK="full", SOFTCAP=False, SLOPES=False, SIZED=False, FIRST=0, LAST=0, BM=16, BN=16)
    looks[(6, 8)](lse, q, 120, k, 40, at.pos, START, None, None, None, *rest, SINKS=False, **fixed)
    new, old, settled = torch.full((30, 6), torch.nan), torch.full((30, 6), torch.nan), torch.full((30,), 7, dtype=torch.int32)
    wide = dict(H=6, HP=8, BN=16)
    uniform[(4,)](new, settled, START, **wide)
    for i in range(rounds):
        new, old = old, new
        received[(2, 4)](
            new, q, 120, k, 40, at.pos, START, None, None, lse, old, settled, *rest, 0.0, WEIGHTED=True, **fixed
        )  # fmt: skip
        if i:
            settle[(4,)](settled, new, old, START, ranking.SETTLED, **wide)
    score = torch.full((30,), torch.nan)
    importance[(4,)](score, new, START, *ranking.SPREAD, **wide)
    exact = ranking.pagerank(q, k, scale=0.2, rounds=rounds, at=at)
    assert torch.allclose(score, exact, rtol=1e-5) and settled[[0, 22]].tolist() == [0, int(rounds > 11)]
    value = choosing("prune", T, K, keep=keep, similar=similar)
    to, more = kept(value, at), torch.tensor([twins(value, n) for n in (21, 0, 1, 8)])
    rows, best = torch.zeros(30, 40), torch.full((30,), torch.nan)
    unit[(30,)](rows, k, 40, H=2, D=20, HP=2, DP=32, FORM="whole")
    side, left, assign, other = (torch.full((30,), -1, dtype=d) for d in (torch.int32, torch.int32, torch.int64, torch.int64))
    halves[(4,)](side, exact, START, to, more, SKIP=1, BN=16)
    tiles = dict(W=40, SIDED=True, BM=16, BN=16, BK=32)
    nearest[(2, 4)](best, other, rows, side, START, **tiles)
    remain[(4,)](left, side, best, START, to, more, SKIP=1, BN=16)
    nearest[(2, 4)](best, other, rows, left, START, **tiles)
    stand[(2,)](assign, left, other, 30, BLOCK=16)
    assert torch.equal(assign, ranking.prune(exact, k, keep=keep, similar=similar, at=at))


@pytest.mark.parametrize(
    "name,text",
    [
        ("BertModel", "tome:share=0.3,metric=heads"), ("ViTModel", "tome:n=2"), ("BertModel", "evit:keep=0.6,layers=0"),
        ("ViTModel", "zero-tprune:keep=0.5,similar=0.3,layers=0,rounds=3"),
        pytest.param("NomicBertModel", "tome:n=3", marks=pytest.mark.nightly),
        pytest.param("CLIPVisionModelWithProjection", "evit:keep=0.4,layers=0", marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_encoders_of_fewer_tokens(name: str, text: str) -> None:
    model, gpu = forwards(name, text, num_hidden_layers=2)
    given = inputs(name, 2, 11)
    found, want, whole = gpu(**given), model(**given), forwards(name, num_hidden_layers=2)[0](**given)
    for key, exact in want.items():
        assert float((found[key] - exact).abs().max()) <= 2e-5 * float(exact.abs().max()), key
        assert float((whole[key] - exact).abs().max()) > 1e-3 * float(exact.abs().max())


PROMPTED = [
    (2, ("insert-cache:dtype=int8", "fastv:layer=1,keep=0.5")),
    pytest.param(3, ("g-search:layers=1+2,keep=80+40",), marks=pytest.mark.nightly),
    pytest.param(1, ("tcra:keep=0.6,segment=4,first=1,last=1",), marks=pytest.mark.nightly),
]


@pytest.mark.parametrize("layers,passes", PROMPTED, ids=str)
def test_prompts_of_fewer_tokens(layers: int, passes: tuple[str, ...]) -> None:
    model = compiled("LlamaConfig", passes, num_hidden_layers=layers)
    found, expected = both(model, on_gpu(model)[0], max_new_tokens=3, eos_token_id=[])
    assert found == expected


def test_positions_are_known_on_the_device() -> None:
    """Of the last token of a prompt that tokens have been left out of, twice: each time a share of all that there were."""
    made = engine(compiled("LlamaConfig", ("g-search:layers=1+2,keep=80+40",), num_hidden_layers=3))
    Decoder(made, 2, 48).prefill(PROMPTS)
    call, pos = made.known("prefill", Tokens.chunk([8, 3], [0, 0])), torch.full((2,), -1)
    assert call is not None and call.schedule.axes[-1] == "last" and list(call.counts.values()) == [11, 10, 6, 2]
    made.device.read(call.axes[len(call.schedule.axes) - 1, "pos"], pos)
    assert pos.tolist() == [7, 2]
