"""Token methods for encoders: identity, tokens left, what merging means, results in the original order, native code."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from encoders import IMAGES, encoder, images, texts
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_llama, tiny_scorer

import elision
from elision.errors import BadInput
from elision.ir.canonical import canonical
from elision.ir.interp import Interpreter
from elision.ir.mask import Mask
from elision.ir.op import lookup
from elision.ir.program import Program
from elision.ir.tokens import Tokens
from elision.ir.value import Value
from elision.passes.pipeline import run
from elision.runtime.model import Model
from tests.passes.calibrating import Weights

CASES = [
    ("BertModel", "tome:share=0.2,metric=heads"),
    ("BertModel", "evit:keep=0.6"),
    ("NomicBertModel", "tome:n=3"),
    ("ViTModel", "tome:share=0.3,layers=1"),
    ("ViTModel", "tome:n=2"),
    ("CLIPVisionModelWithProjection", "evit:keep=0.4,layers=0-2"),
    ("BertModel", "zero-tprune:keep=0.6,layers=0-1"),
    ("ViTModel", "zero-tprune:keep=0.5,similar=0.3"),
]
LENGTHS = (9, 1, 4)


@cache
def source(name: str) -> torch.nn.Module:
    return encoder(name)


@cache
def compiled(name: str, text: str = "", target: str = "cpu") -> Model:
    return elision.compile(source(name), passes=[text] if text else [], target=target, threads=2)


def inputs(name: str, rows: int, length: int) -> dict[str, torch.Tensor]:
    if name in IMAGES:
        return {"pixel_values": images(rows)}
    reads = inspect.signature(source(name).forward).parameters
    return {n: x for n, x in texts(rows, length).items() if n in reads}


@pytest.mark.parametrize(("name", "text"), CASES)
def test_native_code_equals_the_reference(name: str, text: str) -> None:
    native, plain, full = compiled(name, text), compiled(name, text, "reference"), compiled(name)
    for rows, length in ((3, 17), (1, 60), (5, 4), (1, 1)):
        given = inputs(name, rows, length)
        found, want, whole = native(**given), plain(**given), full(**given)
        for key, exact in want.items():
            assert found[key].shape == whole[key].shape
            assert float((found[key] - exact).abs().max()) <= 2e-5 * float(exact.abs().max()), key
            if length == 60:
                assert float((whole[key] - exact).abs().max()) > 1e-3 * float(exact.abs().max())


@pytest.mark.parametrize("text", ["tome", "tome:share=0.0,protect=3", "evit:keep=1.0", "zero-tprune:keep=1.0"])
@pytest.mark.parametrize("name", ["BertModel", "ViTModel"])
def test_the_identity(name: str, text: str) -> None:
    given = inputs(name, 2, 9)
    found, want = compiled(name, text, "reference"), compiled(name, target="reference")
    assert canonical(found.program) == canonical(want.program)
    assert all(torch.equal(found(**given)[key], x) for key, x in want(**given).items())


def encoding() -> tuple[Program, Weights]:
    return tiny_scorer(layers=3, mask=Mask("full"))


def axes(program: Program, weights: Weights, ids: torch.Tensor, at: Tokens) -> tuple[torch.Tensor, dict[str, list[int]]]:
    """The logits, and how many tokens each sequence has whenever tokens are merged."""
    counts: dict[str, list[int]] = {}
    sizes: list[torch.Tensor] = []
    left: list[int] = []

    def observe(value: Value, operands: Sequence[Any]) -> None:
        if value.op == "collect":
            sizes.append(lookup("collect").body(*operands))
        if value.op == "joined":
            left.append(len(operands[1]))

    logits = Interpreter(program, weights, observe=observe).run(program.entries["score"], {"ids": ids}, {"t": at})[0]
    counts["sizes"] = [int(s.sum()) for s in sizes]
    counts["left"] = left
    return logits, counts


def test_counts_and_sizes() -> None:
    """Exactly n of every sequence's tokens go in every layer while there are as many pairs; sizes add up to all tokens."""
    program, weights = encoding()
    ids, at = torch.arange(30) % 60, Tokens.chunk([20, 10], [0, 0])
    left = [axes(run(program, [f"tome:n={n}"]), weights, ids, at)[1] for n in (1, 3)]
    assert left[0]["left"] == [28, 26, 24] and left[1]["left"] == [24, 18, 14]  # the second has but one pair at last
    assert all(found["sizes"] == [30, 30] for found in left)  # nothing reads those after the last layer
    shares = [axes(run(program, [f"tome:share={s}"]), weights, ids, at)[1]["left"] for s in (0.1, 0.2, 0.4)]
    assert all(a > b for few, many in zip(shares, shares[1:], strict=False) for a, b in zip(few, many, strict=True))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 2), st.booleans())
def test_what_is_matched(lengths: list[int], n: int, protect: int, heads: bool) -> None:
    """Against a search over all pairs, one sequence at a time."""
    at = Tokens.chunk(lengths, [0] * len(lengths))
    k = torch.randn(len(at), 3, 4, generator=torch.Generator().manual_seed(n + 7 * len(at)))
    found = lookup("match").body(k, n=n, protect=protect, heads=heads, at=at)
    unit = torch.nn.functional.normalize
    metric = unit(k, dim=-1).flatten(1) if heads else unit(k.mean(1), dim=-1)
    want, start = torch.arange(len(at)), 0
    for length in lengths:
        pairs = []
        for a in range(0, length, 2):
            to = [(float(metric[start + a] @ metric[start + b]), b) for b in range(1, length, 2)]
            if a >= protect and to:
                pairs.append((max(to)[0], a, max(to)[1]))
        for _, a, b in sorted(pairs, reverse=True)[:n]:
            want[start + a] = start + b
        start += length
    assert torch.equal(found, want)


@torch.inference_mode()
def test_equal_tokens_merge_without_a_trace() -> None:
    """A sequence of pairs of the same token without positions: merging each pair with proportional attention changes nothing."""
    program, weights = encoding()
    weights["inv_freq"] = torch.zeros_like(weights["inv_freq"])
    ids, at = torch.tensor([3, 3, 9, 9, 27, 27, 5, 5]), Tokens.chunk([8], [0])
    whole = axes(program, weights, ids, at)[0]
    merged, counts = axes(run(program, ["tome:n=4,protect=0,layers=0"]), weights, ids, at)
    assert counts["left"] == [4]
    torch.testing.assert_close(merged, whole, rtol=1e-9, atol=1e-9)
    unweighted = axes(run(program, ["tome:n=2,protect=0,layers=0"]), weights, ids, at)[0]
    torch.testing.assert_close(unweighted, whole, rtol=1e-9, atol=1e-9)  # of unequal sizes


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from([0.1, 0.5, 0.7, 1.0]))
def test_what_is_fused(lengths: list[int], keep: float) -> None:
    at = Tokens.chunk(lengths, [0] * len(lengths))
    score = torch.rand(len(at), generator=torch.Generator().manual_seed(len(at)))
    found, start = lookup("fuse").body(score, keep=keep, protect=1, at=at), 0
    for length in lengths:
        order = sorted(range(1, length), key=lambda i: -float(score[start + i]))  # noqa: B023
        stays = {0, *order[: -int(-(keep * (length - 1)) // 1)]}
        others = [i for i in order if i not in stays]
        want = [i if i in stays else others[0] for i in range(length)]
        assert (found[start : start + length] - start).tolist() == want
        start += length


def test_what_the_first_token_regards() -> None:
    at = Tokens.chunk(list(LENGTHS), [0, 0, 0])
    q, k = (torch.randn(len(at), heads, 4, generator=torch.Generator().manual_seed(heads)).double() for heads in (4, 2))
    size = 1.0 + torch.arange(len(at)).double() % 3
    found, start = lookup("regard").body(q, k, size, scale=0.5, at=at), 0
    for length in LENGTHS:
        keys = k[start : start + length].repeat_interleave(2, 1)
        logits = torch.einsum("hd,thd->ht", q[start], keys) * 0.5 + size[start : start + length].log()
        torch.testing.assert_close(found[start : start + length], logits.softmax(-1).mean(0), rtol=1e-5, atol=1e-6)
        start += length


def test_page_rank_is_the_stationary_distribution() -> None:
    """After many rounds, by head, the left eigenvector of attention, scaled to mean 1; one round is what tokens receive."""
    n, at = 9, Tokens.chunk([9, 4], [0, 0])
    q, k = (torch.randn(13, 1, 4, generator=torch.Generator().manual_seed(i)).double() for i in (1, 2))
    a = (q[:n, 0] @ k[:n, 0].T * 0.7).softmax(-1)
    once, often = (lookup("pagerank").body(q, k, scale=0.7, rounds=r, at=at) for r in (1, 200))
    torch.testing.assert_close(once[:n], a.sum(0), rtol=1e-4, atol=1e-4)
    values, vectors = torch.linalg.eig(a.T)
    steady = vectors[:, values.real.argmax()].real
    torch.testing.assert_close(often[:n], steady / steady.sum() * n, rtol=3e-3, atol=3e-3)
    assert abs(float(often[n:].sum()) - 4) < 1e-3  # mass is conserved, sequences are apart


def test_heads_without_a_say_are_left_out() -> None:
    """A head whose scores are all alike says nothing; where every head is so, all count."""
    at = Tokens.chunk([8], [0])
    q, k = (torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(i)) for i in (3, 4))
    q[:, 1] = 0  # attends evenly
    both, first = (lookup("pagerank").body(q[:, :h], k[:, :h], scale=1.0, rounds=1, at=at) for h in (2, 1))
    torch.testing.assert_close(both, first)
    alike = lookup("pagerank").body(q[:, 1:], k[:, 1:], scale=1.0, rounds=1, at=at)
    torch.testing.assert_close(alike, torch.ones(8))


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from([0.1, 0.5, 0.7, 1.0]), st.sampled_from([0.0, 0.4, 1.0])
)
def test_what_is_pruned(lengths: list[int], keep: float, similar: float) -> None:
    at, generator = Tokens.chunk(lengths, [0] * len(lengths)), torch.Generator().manual_seed(sum(lengths))
    score, k = torch.rand(len(at), generator=generator), torch.randn(len(at), 2, 4, generator=generator)
    unit = torch.nn.functional.normalize(k, dim=-1).flatten(1) / 2**0.5
    found, begin = lookup("prune").body(score, k, keep=keep, similar=similar, protect=1, at=at), 0
    for n in lengths:
        left = int(-(-(keep * (n - 1) - 1e-9) // 1))
        twins = min(int(similar * (n - 1 - left)), left)
        order = sorted(range(1, n), key=lambda i: -float(score[begin + i]))[: left + twins]  # noqa: B023
        half = (len(order) + 1) // 2
        alike = {i: max(float(unit[begin + i] @ unit[begin + j]) for j in order[:half]) for i in order[half:]}
        gone = set(sorted(alike, key=lambda i: -alike[i])[:twins])
        stays = {0, *(i for i in order if i not in gone)}
        assert len(stays) == left + 1
        for i in range(n):
            to = int(found[begin + i]) - begin
            best = max(stays, key=lambda j: float(unit[begin + i] @ unit[begin + j]))  # noqa: B023
            assert to == (i if i in stays else best)
        begin += n


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tome:n=-1", "expected n >= 0"),
        ("tome:n=2,share=0.1", "one of the two"),
        ("tome:share=0.7", "a share from 0 to 0.5"),
        ("tome:n=1,metric=cosine", "expected mean or heads"),
        ("tome:n=1,layers=7", "there is no layer 7"),
        ("evit:keep=0.0", "keep=0.0; expected a share"),
        ("evit:layers=7", "there is no layer 7"),
        ("zero-tprune:keep=0.0", "expected 0 < keep"),
        ("zero-tprune:similar=1.5", "0 <= similar <= 1"),
        ("zero-tprune:layers=7", "there is no layer 7"),
    ],
)
def test_bad_settings(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        run(encoding()[0], [text])


@pytest.mark.parametrize("text", ["tome:n=1", "evit", "zero-tprune"])
def test_decoders_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no encoder"):
        run(tiny_llama()[0], [text])
    program, _ = tiny_scorer(mask=Mask("window", 4))
    program.meta["causal"] = False
    with pytest.raises(BadInput, match="another kind than full"):
        run(program, [text])


def test_an_artefact(tmp_path: object) -> None:
    model = compiled("BertModel", "tome:share=0.2")
    model.save(f"{tmp_path}/tome.elision")
    given = inputs("BertModel", 3, 17)
    again = elision.load(f"{tmp_path}/tome.elision", threads=2)
    assert again.program.quality == "approximate" and again.report["passes"] == ["tome:share=0.2"]
    torch.testing.assert_close(again(**given)[0], model(**given)[0])
