"""What every method on caches must pass: the identity setting, more budget is better, bytes as the type says, and what it
composes with: speculation, skipped layers, weight formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import elision
from elision.errors import IllegalProgram
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.ir.layout import nbytes
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.ir.requests import Requests
from elision.ir.states import KV
from elision.ir.tokens import Tokens
from elision.ir.verify import Request
from elision.ir.warp import Warp
from elision.passes import REGISTRY
from elision.runtime.session import Session
from elision.runtime.speculation import drafting_of
from tests.passes.kv_methods import METHODS, NEW, PROMPT, compiled, drafted, prompts, tokens

READING = ("quest", "tidal-decode")  # keep all entries, and read some
BUDGETS = {
    "streaming-llm": "streaming-llm:sinks=2,window={}",
    "h2o": "h2o:recent=4,sinks=1,budget={}",
    "a2sf": "a2sf:recent=4,sinks=1,budget={}",
    "keyformer": "keyformer:recent=4,sinks=1,budget={}",
    "ems": "ems:window=4,budget={}",
    "snapkv": "snapkv:window=4,budget={}",
    "kv-quant": "kv-quant:group=4,bits={}",
    "kivi": "kivi:group=16,residual=0,bits={}",
    "gear": "gear:block=16,rank=1,bits={}",
    "quest": "quest:page=2,dense=0,budget={}",
    "duo-attention": "duo-attention:sparsity=1,sinks=1,window={}",
    "tidal-decode": "tidal-decode:layers=0,budget={}",
}


def test_every_method_is_here() -> None:
    assert set(METHODS) == {name for name, cls in REGISTRY.items() if cls.family == "kv" and name != "random"}


@pytest.mark.parametrize("name", METHODS)
def test_identity(name: str) -> None:
    tight, whole = METHODS[name]
    if whole:
        assert torch.equal(tokens(compiled(whole)), tokens(compiled()))
        assert not torch.equal(tokens(compiled(tight)), tokens(compiled()))


@dataclass
class Seen(Requests):
    """Keeps the logits of a round."""

    logits: list[torch.Tensor] = field(default_factory=list)

    def verify(self, ids: torch.Tensor, logits: torch.Tensor, *rest: Any, at: Tokens | None = None) -> Any:
        self.logits.append(logits)
        return super().verify(ids, logits, *rest, **({} if at is None else {"at": at}))


def after(model: elision.Model, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the token after the prompts and one more."""
    session = Session(model._interpreter, len(ids), PROMPT + 2)
    rows = range(len(ids))
    with torch.inference_mode():
        session.prefill(ids.tolist())
        requests = Seen([Request(Warp(), True, 0, r) for r in rows], list(ids), [PROMPT] * len(ids))
        session.round({r: 5 for r in rows}, requests)
    return requests.logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("name", BUDGETS)
def test_more_is_better(name: str) -> None:
    """The divergence from the whole cache, mean over 20 texts, falls with the budget (the bits)."""
    ids = torch.randint(1, 64, (20, PROMPT), generator=torch.Generator().manual_seed(2))
    want = after(compiled(), ids)
    found = []
    for budget in (4, 8) if "bits" in BUDGETS[name] else (8, 24, 48, 64):
        got = after(compiled(BUDGETS[name].format(budget)), ids)
        found.append(float((want.exp() * (want - got)).sum(-1).mean()))
    assert found == sorted(found, reverse=True) and found[0] > 2 * found[-1], found


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_the_type(name: str) -> None:
    model = compiled(METHODS[name][0])
    tokens(model)
    types = model.program.states.values()
    assert model.stats is not None and all(isinstance(t, KV) for t in types)
    assert model.stats.state_bytes == sum(nbytes(t, 2, PROMPT + NEW, PROMPT) for t in types)
    assert model.stats.prompt_state_bytes == sum(nbytes(t, 2, PROMPT + NEW, None) for t in types)
    if name not in READING:
        tokens(compiled())
        assert compiled().stats.state_bytes > model.stats.state_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize("name", METHODS)
def test_speculation_on_a_compressed_cache_changes_nothing(name: str, target: str) -> None:
    text = METHODS[name][0]
    model = compiled(text, "token-recycling:nodes=20", "pain-trie:nodes=20", target=target)
    assert torch.equal(drafted(model), tokens(compiled(text, target=target)))
    assert model.stats is not None and model.stats.accepted > 20 and model.stats.rounds < NEW - 10


FORMATS: Sequence[tuple[str, ...]] = (("bf16",), ("int4:group=32",), ("int8:group=32", "a8"))


@pytest.mark.nightly
@pytest.mark.parametrize("name", METHODS)
def test_weight_formats_and_skipped_layers(name: str) -> None:
    """In any order the same program; natively the tokens of the reference, and the identity setting those without the method."""
    tight, whole = METHODS[name]
    for formats in FORMATS:
        model = compiled(tight, "skip-layers:layers=1", *formats, target="cpu")
        assert torch.equal(tokens(model), tokens(compiled("skip-layers:layers=1", *formats, tight)))
        assert {n.removesuffix("_few") for n in model.program.states} == {"kv_0", "kv_2"} and model.native is not None
        hosts = {op for entry in model.native.hosts.values() for op, _ in entry}
        assert bool(hosts & {"append", "attend", "observe", "pick"}) == (name == "gear")
        if whole:
            plain = tokens(compiled("skip-layers:layers=1", *formats))
            assert torch.equal(tokens(compiled(whole, "skip-layers:layers=1", *formats)), plain)


@pytest.mark.parametrize("name", METHODS)
def test_as_text_and_back(name: str) -> None:
    program = compiled(METHODS[name][0]).program
    assert parse_program(print_program(program)) == program


def test_an_artefact_holds_it_all(tmp_path: Path) -> None:
    model = compiled(METHODS["h2o"][0], "kv-quant", target="cpu")
    model.save(tmp_path / "small.elision")
    again = elision.load(tmp_path / "small.elision")
    assert torch.equal(tokens(again), tokens(model)) and again.program.ticks == model.program.ticks


def test_what_does_not_compose_is_named() -> None:
    with pytest.raises(IllegalProgram, match="retract"):
        compiled("h2o:budget=24,recent=4,every=1", "pain-trie")


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_drafts_end_where_the_clock_ticks_at_the_last_position(target: str) -> None:
    """Prompt and new tokens together a multiple of ``every``: the last token is drafted, never committed."""
    tight = METHODS["a2sf"][0]
    plain, drafted = compiled(tight, target=target), compiled(tight, "prompt-lookup", "token-recycling", target=target)
    fresh = drafting_of(drafted._interpreter, "")
    assert fresh is not None and isinstance(fresh, Drafting)
    drafted.drafting = Drafting(fresh.drafters, Always(20))
    ids = prompts(1)[:, :40]
    assert torch.equal(drafted.generate(ids, max_new_tokens=40), plain.generate(ids, max_new_tokens=40))


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_a_full_budget_is_told(target: str) -> None:
    """A cache whose clock does not make room is refused when it is full, natively too."""
    from dataclasses import replace

    from elision.errors import BadInput

    model = compiled("h2o:budget=40,recent=8,every=8", target=target)
    ticks = model.program.ticks
    try:
        model.program.ticks = tuple(replace(t, every=0) for t in ticks)
        with pytest.raises(BadInput, match="full|do not fit"):
            model.generate(prompts(1), max_new_tokens=NEW)
    finally:
        model.program.ticks = ticks
