"""Token methods for prompts: what is left out against masking by hand, identity, counts, native code, what they compose with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs import tiny_llama, tiny_scorer

import elision
from elision.errors import BadInput, IllegalProgram
from elision.ir.canonical import canonical
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.ir.mask import Mask
from elision.ir.op import lookup
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.program import Program
from elision.ir.states import KV, Present
from elision.ir.tokens import Tokens
from elision.ir.value import Builder, Value
from elision.ir.verifier import verify
from elision.passes.kv.caches import Cached
from elision.passes.pipeline import run
from elision.runtime.session import Session
from elision.runtime.speculation import drafting_of
from tests.passes.small import ragged, tiny

HALF = "fastv:keep=0.5"
NEW = 20


@functools.cache
def original() -> Any:
    return tiny(num_hidden_layers=4, initializer_range=0.15)


@functools.cache
def compiled(*passes: str, target: str = "reference") -> elision.Model:
    return elision.compile(original(), passes=list(passes), target=target, threads=2)


def tokens(model: elision.Model) -> torch.Tensor:
    ids, mask = ragged()
    found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    assert isinstance(found, torch.Tensor)
    return found


def test_the_identity() -> None:
    whole, one = compiled(), compiled("fastv:keep=1.0")
    assert canonical(one.program) == canonical(whole.program)
    assert torch.equal(tokens(one), tokens(whole)) and not torch.equal(tokens(compiled(HALF)), tokens(whole))


@torch.inference_mode()
def by_hand(ids: torch.Tensor, prompt: int, cuts: dict[int, float], last: int = 1, first: int = 1) -> torch.Tensor:
    """The model's logits ``[T, vocab]`` with tokens of the prompt masked as keys from some layers on: nothing is left out."""
    model = original().model
    t = len(ids)
    h, at = model.embed_tokens(ids[None]), torch.arange(t)[None]
    turned = model.rotary_emb(h, at)
    seen, left = torch.ones(t, t).tril().bool(), torch.arange(prompt)
    probabilities = torch.empty(0)
    for i, layer in enumerate(model.layers):
        if i in cuts:
            score = probabilities[0, :, prompt - last : prompt, :prompt].mean((0, 1))
            free = [j for j in left.tolist() if first <= j < prompt - last]
            free.sort(key=lambda j: (-float(score[j]), j))  # noqa: B023
            count = max(ceil(cuts[i] * prompt) - first - last, 0)
            left = torch.tensor(sorted([*range(first), *free[:count], *range(max(prompt - last, first), prompt)]))
            gone = torch.ones(t, dtype=torch.bool)
            gone[left] = False
            seen = seen & ~(gone & (torch.arange(t) < prompt))
        layer.self_attn.config._attn_implementation = "eager"
        bias = torch.where(seen | torch.eye(t).bool(), 0.0, -torch.inf)[None, None]
        x, probabilities = layer.self_attn(layer.input_layernorm(h), turned, bias)
        h = h + x
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    found: torch.Tensor = original().lm_head(model.norm(h))[0]
    return found


CASES = [
    (HALF, {2: 0.5}, 1, 1),
    ("fastv:keep=0.2,layer=1", {1: 0.2}, 1, 1),
    ("fastv:keep=0.6,last=4,first=2", {2: 0.6}, 4, 2),
]


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize(("text", "cuts", "last", "first"), CASES)
def test_leaving_out_is_masking(text: str, cuts: dict[int, float], last: int, first: int, target: str) -> None:
    """Greedy tokens, of the prompt and of decoding after it, are those of the model with these keys masked."""
    ids = torch.randint(1, 64, (1, 40), generator=torch.Generator().manual_seed(5))
    found = compiled(text, target=target).generate(ids, max_new_tokens=NEW)[0]
    logits = by_hand(found, 40, cuts, last, first)
    assert torch.equal(logits[39:-1].argmax(-1), found[40:])
    whole = by_hand(found, 40, {})
    assert not torch.equal(whole[39:-1].argmax(-1), found[40:])


def left(model: elision.Model, chunk: int = 512) -> list[list[list[int]]]:
    """The positions that every cache holds of every prompt."""
    ids, mask = ragged()
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    session = Session(model._interpreter, len(prompts), 64)
    with torch.inference_mode():
        session.prefill(prompts, chunk)
    stores = [session._stores[n] for n in sorted(session._stores)]
    return [[[p for p in row.tolist() if p >= 0] for row in s.positions()[:, 0]] for s in stores]


def test_later_caches_hold_what_is_left() -> None:
    before: list[set[int]] = [set() for _ in range(4)]
    for keep in (0.1, 0.4, 0.5, 0.9):
        model = compiled(f"fastv:keep={keep}")
        found, native = left(model), left(compiled(f"fastv:keep={keep}", target="cpu"))
        assert found == native
        assert all(positions == list(range(n)) for layer in found[:2] for positions, n in zip(layer, (7, 30, 1, 18), strict=True))
        assert found[2] == found[3] and [len(p) for p in found[2]] == [min(n, max(ceil(keep * n), 2)) for n in (7, 30, 1, 18)]
        now = [set(p) for p in found[2]]
        assert all(few <= more for few, more in zip(before, now, strict=True))  # nested in the share
        assert all({0, n - 1} <= p for p, n in zip(now, (7, 30, 1, 18), strict=True))
        before = now
        presents = [t.present for t in model.program.states.values() if isinstance(t, KV)]
        assert presents == [Present()] * 2 + [Present("subset", "kept2")] * 2


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_prompt_is_read_in_one_piece(target: str) -> None:
    model = compiled(HALF, target=target)
    assert left(model, chunk=8) == left(model)


@pytest.mark.parametrize(("text", "cuts", "last", "first"), CASES)
def test_native_code_equals_the_reference(text: str, cuts: dict[int, float], last: int, first: int) -> None:
    native = compiled(text, target="cpu")
    assert torch.equal(tokens(native), tokens(compiled(text)))
    assert native.native is not None
    hosts = {op for entry in native.native.hosts.values() for op, _ in entry}
    assert hosts == {"received", "foremost", "which"}


WITH = [
    ("skip-layers:layers=1",),
    ("h2o:budget=12,recent=4,sinks=1",),
    *(
        pytest.param(more, marks=pytest.mark.nightly)
        for more in (
            ("skip-layers:layers=2",), ("kv-quant",), ("snapkv:budget=12,window=4",), ("streaming-llm:window=12,sinks=2",),
            ("int8",),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("more", WITH)
def test_what_it_composes_with(more: tuple[str, ...]) -> None:
    native = compiled(HALF, *more, target="cpu")
    found = tokens(native)
    assert torch.equal(found, tokens(compiled(*more, HALF)))
    assert native.native is not None and not any(op in ("append", "attend") for e in native.native.hosts.values() for op, _ in e)


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("more", [(), ("h2o:budget=12,recent=4,sinks=1",)])
def test_speculation_changes_nothing(target: str, more: tuple[str, ...]) -> None:
    model = compiled(HALF, *more, "token-recycling:nodes=20", "pain-trie:nodes=20", target=target)
    fresh = drafting_of(model._interpreter, "")
    assert fresh is not None
    model.drafting = Drafting(list(fresh.drafters), Always(12))
    assert torch.equal(tokens(model), tokens(compiled(HALF, *more, target=target)))
    assert model.stats is not None and model.stats.accepted > 10


def test_as_text_and_in_an_artefact(tmp_path: Path) -> None:
    model = compiled(HALF, target="cpu")
    assert parse_program(print_program(model.program)) == model.program and model.program.quality == "approximate"
    model.save(tmp_path / "half.elision")
    assert torch.equal(tokens(elision.load(tmp_path / "half.elision")), tokens(model))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(0.05, 1.0), st.integers(1, 3), st.integers(1, 3))
def test_which_are_foremost(lengths: list[int], keep: float, first: int, last: int) -> None:
    at = Tokens.chunk(lengths, [3 * i for i in range(len(lengths))])
    score = torch.randint(0, 5, (len(at),), generator=torch.Generator().manual_seed(len(at))).float()
    found, begin = lookup("foremost").body(score, keep=keep, first=first, last=last, at=at), 0
    for n in lengths:
        ranked = sorted(range(n), key=lambda i: (first <= i < n - last, -float(score[begin + i]), i))  # noqa: B023
        want = set(ranked[: max(ceil(keep * n - 1e-9), first + last)])
        assert set(found[begin : begin + n].nonzero().flatten().tolist()) == want
        begin += n


def test_shares_are_of_the_whole_prompt() -> None:
    """Where tokens have been left out before, the share still counts those of the prompt."""
    at = Tokens.chunk([10], [0]).gather(torch.tensor([0, 2, 3, 5, 8, 9]))
    assert int(lookup("foremost").body(torch.rand(6), keep=0.4, at=at).sum()) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fastv:keep=0.0", "keep=0.0; expected a share"),
        ("fastv:keep=1.5", "keep=1.5; expected a share"),
        ("fastv:layer=0", "expected a layer from 1 to 1"),
        ("fastv:layer=2", "expected a layer from 1 to 1"),
        ("fastv:layer=1,last=0", "last=0"),
        ("fastv:layer=1,first=0", "first=0"),
    ],
)
def test_bad_settings(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        run(tiny_llama()[0], [text])


def test_encoders_have_no_prompt() -> None:
    with pytest.raises(BadInput, match="no prompt"):
        run(tiny_scorer(mask=Mask("full"))[0], ["fastv:layer=1"])


def broken(change: Callable[[Program], None]) -> str:
    program = run(tiny_llama(layers=3)[0], ["fastv:layer=1"])
    change(program)
    with pytest.raises(IllegalProgram) as err:
        verify(program)
    return err.value.rule


def test_rules_that_hold_it() -> None:
    def all_there(program: Program) -> None:
        from dataclasses import replace

        types = {n: replace(t, present=Present()) for n, t in program.states.items() if isinstance(t, KV)}
        Cached(program, "test").take(types)

    assert broken(all_there) == "validity"  # a cache of a later layer that claims every position

    def in_step(program: Program) -> None:
        def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
            if v.op != "norm":
                return None
            rows = b.add("restrict", args[0], b.add("last", args[0], axis="kept"))
            return b.add_with("norm", (rows, *args[1:]), dict(v.attrs), None)

        program.rewrite(rule, "step")

    assert broken(in_step) == "axis"
