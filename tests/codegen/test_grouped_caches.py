"""Native attention over codes in groups, and over two segments: the numbers of the reference, and what has no kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import elision
from elision.codegen.cpu.compile import compile_program
from elision.errors import IllegalProgram
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.ir.requests import Requests
from elision.ir.value import Builder, Value, rewrite
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.llvm.processor import host_level
from elision.runtime.session import Session
from elision.runtime.speculation import drafting_of
from tests.passes.small import tiny

PROMPT, NEW = 45, 40
NATIVE = [
    "kv-quant:bits=4", "kv-quant:bits=4,group=16", "kv-quant:bits=8,group=16", "kivi:bits=2,group=16,residual=16",
    "kivi:bits=4,group=32,residual=0", "kivi:bits=8,group=16,residual=32",
    "gear:bits=4,block=16", "gear:bits=2,block=32,rank=1,residual=32", "gear:bits=2,block=16,outliers=2,rank=0",
    "gear:bits=2,block=16,outliers=0,rank=5",
]  # fmt: skip


@cache
def model(width: int = 128) -> Any:
    return tiny(num_hidden_layers=2, initializer_range=0.12, hidden_size=width)


@cache
def compiled(*passes: str, target: str = "cpu", width: int = 128) -> elision.Model:
    return elision.compile(model(width), passes=list(passes), target=target, threads=2)


def prompts(rows: int = 2) -> torch.Tensor:
    return torch.randint(1, 9, (rows, PROMPT), generator=torch.Generator().manual_seed(1))


class Forced(Requests):
    """Keeps the logits, and gives fixed tokens."""

    seen: list[torch.Tensor]

    def verify(self, ids: torch.Tensor, logits: torch.Tensor, *rest: Any, **more: Any) -> Any:
        self.seen.append(logits.clone())
        return [[0]] * len(self.items), torch.full((len(self.items),), 5 + len(self.seen) % 7)


def logits(model: elision.Model) -> torch.Tensor:
    """``[rounds, rows, vocab]`` after fixed tokens, the prompts among them."""
    session = Session(model._interpreter, 2, PROMPT + NEW)
    requests = Forced([Request(Warp(), True, 0, r) for r in range(2)], list(prompts()), [PROMPT] * 2)
    with torch.inference_mode():
        first = session.prefill([prompts()[0].tolist(), prompts()[1, :20].tolist()])
        requests.seen = []
        for i in range(NEW - 1):
            session.round({r: 5 + i % 7 for r in range(2)}, requests)
    return torch.stack([first, *requests.seen])


@pytest.mark.parametrize("text", NATIVE)
def test_numbers_are_those_of_the_reference(text: str) -> None:
    native, reference = compiled(text), compiled(text, target="reference")
    assert native.native is not None and not any(native.native.hosts.values())
    want = logits(reference)
    torch.testing.assert_close(logits(native), want, rtol=2e-3, atol=2e-3)
    assert float((logits(compiled(target="reference")) - want).abs().max()) > 4e-3


@pytest.mark.parametrize("text", NATIVE)
def test_drafted_tokens_join_the_cache(text: str) -> None:
    """Tokens of drafts and of their commit are those of the reference without any."""
    drafting = compiled(text, "token-recycling:nodes=20", "pain-trie:nodes=20")
    fresh = drafting_of(drafting._interpreter, "")
    assert isinstance(fresh, Drafting)
    drafting.drafting = Drafting(list(fresh.drafters), Always(12))
    want = compiled(text, target="reference").generate(prompts(), max_new_tokens=NEW)
    assert torch.equal(drafting.generate(prompts(), max_new_tokens=NEW), want)
    assert drafting.stats is not None and drafting.stats.accepted > 5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kv-quant:bits=8,group=8", "8-bit codes in groups of 8 channels"),
        ("kivi:group=8,residual=0", "4-bit codes in groups of 8 tokens"),
        ("gear:block=8", "4-bit codes in groups of 8 tokens"),
        ("gear:block=16,rank=9", "with a matrix of rank 9; kernels take"),
    ],
)
def test_what_has_no_kernel_is_told_and_right(text: str, why: str) -> None:
    native = compiled(text)
    assert native.native is not None and any(why in reason for _, reason in native.native.hosts["step"])
    torch.testing.assert_close(logits(native), logits(compiled(text, target="reference")), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("text", [text for text in NATIVE if not text.startswith("kv-quant")])
def test_blocks_move_natively(text: str) -> None:
    """The same codes lie in the same places, and what repairs them is as good."""
    native, reference = compiled(text), compiled(text, target="reference")
    assert native.native is not None and text.partition(":")[0] in native.native.schedules
    mine, theirs = (session(m) for m in (native, reference))
    for name, store in mine._stores.items():
        other = theirs._stores[name]
        for what in "kv":
            assert torch.equal(store.len[what], other.len[what]) and int(store.len[what][0].min()) >= 32
            arrays, same = store.segments[0].planes[what].arrays, other.segments[0].planes[what].arrays
            for each in arrays.keys() - {"left", "right"}:  # of which columns may change their signs
                if each in ("codes", "place"):
                    assert float((arrays[each] != same[each]).float().mean()) < 2e-3, each
                else:
                    torch.testing.assert_close(arrays[each], same[each], rtol=1e-3, atol=1e-3)
            n = int(store.len[what][0].min())
            a, b = (s.segments[0].read_all(what, n, torch.float32) for s in (store, other))
            assert float((a - b).abs().mean()) < 1e-3 * float(b.abs().mean())


def session(model: elision.Model) -> Session:
    """After prompts and 20 tokens, of which the clock moves some."""
    found = Session(model._interpreter, 2, PROMPT + NEW)
    with torch.inference_mode():
        found.prefill([prompts()[0].tolist(), prompts()[1].tolist()])
        requests = Forced([Request(Warp(), True, 0, r) for r in range(2)], list(prompts()), [PROMPT] * 2)
        requests.seen = []
        for i in range(20):
            found.round({r: 5 + i % 7 for r in range(2)}, requests)
    return found


def test_scores_beside_groups_stay_on_the_host() -> None:
    passes = ("h2o:budget=24,recent=6,every=8", "kv-quant:bits=4")
    native, want = compiled(*passes), compiled(*passes, target="reference").generate(prompts(), max_new_tokens=NEW)
    assert native.native is not None and ("attend", "scores beside codes in groups") in native.native.hosts["step"]
    assert torch.equal(native.generate(prompts(), max_new_tokens=NEW), want)


def test_keys_and_values_that_move_apart_are_refused() -> None:
    """Kernels count the entries of a segment once for both."""
    program = compiled("kivi:group=16,residual=16", target="reference").program
    tick = program.ticks[0]

    def rule(b: Builder, v: Value, args: tuple[Value, ...]) -> Value | None:
        return b.add_with("flush", args, {**dict(v.attrs), "what": "k"}, None) if v.op == "flush" else None

    apart = replace(program, ticks=(replace(tick, graph=rewrite(tick.graph, rule)),))
    with pytest.raises(IllegalProgram, match="flushed apart"):
        compile_program(apart)


@pytest.mark.parametrize("text", ["kv-quant:bits=4,group=16", "gear:block=16,outliers=2"])
def test_a_head_of_another_width(text: str) -> None:
    """48 channels: values in vectors of 16, keys in three groups."""
    native = compiled(text, width=192)
    assert native.native is not None and not any(native.native.hosts.values())
    torch.testing.assert_close(logits(native), logits(compiled(text, target="reference", width=192)), rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not host_level().startswith("x86-64"), reason="levels of x86-64")
@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3"])
def test_older_processors(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without f16c, scales and what repairs a block become floats by functions that the linker must find."""
    monkeypatch.setattr("elision.codegen.cpu.compile.host_level", lambda: level)
    passes = ["int4", "gear:bits=2,block=16,rank=1"]
    native = elision.compile(model(64), passes=passes, target="cpu", threads=1)
    assert native.native is not None and native.native.level == level
    found = native.generate(prompts(), max_new_tokens=NEW)
    assert torch.equal(found, compiled(*passes, target="reference", width=64).generate(prompts(), max_new_tokens=NEW))
