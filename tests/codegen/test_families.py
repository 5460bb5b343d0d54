"""Every decoder family as native code against the reference interpreter: logits of chunks and trees, tokens, ragged batches."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from families import FEW, LONG, decoder

import elision
from elision.ir import tree
from elision.ir.tokens import Tokens
from elision.runtime.model import Model
from elision.runtime.session import Session

LENGTHS, NEW = (21, 1, 13), 32
TREES = (tree.Tree((-1, 0, 0, 1, 1, 2, 5)), tree.Tree((-1,)), tree.Tree((-1, *range(11))))


@cache
def both(family: str, **options: Any) -> tuple[Model, Model]:
    """The model as native code for two threads, and the same program interpreted."""
    native = elision.compile(decoder(family), threads=2, **options)
    weights = {name: native.weights[name] for name in native.program.params}
    plain = Model(native.program, weights, tokenizer=None, defaults={}, coverage=native.coverage, max_context=native.max_context)
    return native, plain


def close(found: torch.Tensor, want: torch.Tensor, bound: float = 1e-4) -> None:
    assert float((found - want).abs().max()) <= bound * float(want.abs().max())


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 120, (n,), generator=generator).tolist() for n in LENGTHS]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(LENGTHS)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts()])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in LENGTHS])
    return ids, mask


def step(session: Session, model: Model, trees: dict[int, tree.Tree]) -> torch.Tensor:
    """Logits of drafted nodes, with tokens that depend on their place."""
    row, pos, parent, anc = tree.pack(list(trees.values()), [session.committed[r] for r in trees])
    at = Tokens(torch.tensor(list(trees))[row], pos, session.rows, parent, anc)
    ids = (torch.arange(len(row)) * 37 + 11) % 100 + 5
    found: torch.Tensor = session._run(model.program.entries["step"], {"ids": ids}, at)[0]
    return found


@pytest.mark.parametrize("family", FEW)
@torch.inference_mode()
def test_logits_of_chunks_and_trees(family: str) -> None:
    native, plain = both(family)
    for chunk in (512, 7):
        fast, slow = Session(native._interpreter, 3, 64), Session(plain._interpreter, 3, 64)
        close(fast.prefill(prompts(), chunk), slow.prefill(prompts(), chunk))
        for trees in (dict(enumerate(TREES)), {0: TREES[0], 2: TREES[1]}):
            close(step(fast, native, trees), step(slow, plain, trees))


@pytest.mark.parametrize("family", FEW)
def test_the_models_own_forward(family: str) -> None:
    """Padded rows, on either side and in between, and positions of the caller's; what it keeps is kept for no other call."""
    native, plain = both(family)
    ids = torch.randint(3, 100, (3, 40), generator=torch.Generator().manual_seed(7))
    holes = torch.ones_like(ids)
    holes[0, 25:], holes[1, :9], holes[2, 3:18:2] = 0, 0, 0
    later = torch.arange(40).expand(3, -1) + torch.tensor([[0], [5], [60]])
    for given in ({"attention_mask": holes}, {"position_ids": later}, {}):
        found, want = (m(ids, **given).logits for m in (native, plain))
        assert found.abs().max() > 0
        close(found, want)
    close(native(ids[:1, :7]).logits, plain(ids[:1, :7]).logits)


@pytest.mark.parametrize("family", LONG)
def test_greedy_tokens_of_a_ragged_batch(family: str) -> None:
    native, plain = both(family)
    ids, mask = padded()
    found = native.generate(ids, mask, max_new_tokens=NEW, eos_token_id=[])
    assert torch.equal(found, plain.generate(ids, mask, max_new_tokens=NEW, eos_token_id=[]))
    alone = native.generate(ids[:1], max_new_tokens=NEW, eos_token_id=[])
    assert torch.equal(alone, found[:1])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@torch.inference_mode()
def test_a_cache_of_bytes(family: str) -> None:
    """Codes and logits; a sum in another order may round a few numbers to the next code."""
    native, plain = both(family, kv_dtype="int8")
    exact, _ = both(family)
    assert native.native is not None and not any(native.native.hosts.values())
    assert native.program.quality == "approximate" and native.report["passes"] == ["insert-cache:dtype=i8"]
    fast, slow, floats = (Session(m._interpreter, 3, 64) for m in (native, plain, exact))
    assert fast.bytes() < floats.bytes()
    logits = fast.prefill(prompts(), 7)
    close(logits, slow.prefill(prompts(), 7), 1e-2)
    error = (logits - floats.prefill(prompts(), 7)).abs().max()
    assert 0 < float(error) < 0.05 * float(logits.abs().max())
    close(step(fast, native, dict(enumerate(TREES))), step(slow, plain, dict(enumerate(TREES))), 1e-2)
    for name in native.program.states:
        for segment in (0, 1):
            for what in "kv":
                found, want = (s._stores[name].segments[segment].planes[what].arrays for s in (fast, slow))
                apart = (found["codes"].int() - want["codes"].int()).abs()
                assert int(apart.max()) <= 1 and float(apart.float().mean()) < 2e-3
                assert int((want["codes"] != 0).sum()) > 100
                assert torch.allclose(found["scale"], want["scale"], rtol=1e-2)
    assert native.generate(torch.tensor([prompts()[0]]), max_new_tokens=8, eos_token_id=[]).shape == (1, LENGTHS[0] + 8)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"kv_dtype": "bfloat16"}], ids=str)
@torch.inference_mode()
def test_other_dtypes(options: dict[str, str]) -> None:
    """Activations that are not float32 run on the host, and say so; a cache of another dtype is read natively."""
    native, plain = both("llama", **options)
    assert native.native is not None and bool(native.native.hosts["step"]) == ("dtype" in options)
    fast, slow = Session(native._interpreter, 3, 64), Session(plain._interpreter, 3, 64)
    bound = 1e-6 if "dtype" in options else 1e-2
    close(*(m(torch.tensor(prompts()[:1])).logits.float() for m in (native, plain)), bound)
    close(fast.prefill(prompts(), 7).float(), slow.prefill(prompts(), 7).float(), bound)
    close(step(fast, native, dict(enumerate(TREES))).float(), step(slow, plain, dict(enumerate(TREES))).float(), bound)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@torch.inference_mode()
def test_encoded_experts(family: str) -> None:
    native, plain = both(family, passes=("int8:group=32",))
    assert native.native is not None and not any(native.native.hosts.values())
    assert any(len(t.axes) == 3 and t.encoding is not None for t in native.program.params.values())
    fast, slow = Session(native._interpreter, 3, 64), Session(plain._interpreter, 3, 64)
    close(fast.prefill(prompts(), 512), slow.prefill(prompts(), 512))
    close(step(fast, native, dict(enumerate(TREES))), step(slow, plain, dict(enumerate(TREES))))
