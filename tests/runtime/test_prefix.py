"""A prefix that was read once: the tokens are those of prompts with it at their beginning."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import elision
from elision.errors import ArtefactError, BadInput
from elision.ir.drafting.policy import Always
from elision.ir.drafting.run import Drafting
from elision.runtime.prefix import AGAIN
from elision.runtime.speculation import drafting_of
from tests.passes.small import tiny

NEW = 40
METHODS = (
    (), ("h2o:budget=24,recent=8,sinks=1,every=8",), ("a2sf:budget=24,recent=8,alpha=0.9",), ("snapkv:budget=20,window=12",),
    ("keyformer:budget=24,recent=8",), ("ems:budget=24,window=8,theta=0.2",),
    ("streaming-llm:window=21,sinks=3",), ("kv-quant",), ("skip-layers:layers=1",),
)  # fmt: skip


@functools.cache
def compiled(*passes: str, target: str = "cpu") -> elision.Model:
    return elision.compile(tiny(num_hidden_layers=3, initializer_range=0.12), passes=list(passes), target=target)


def ids(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 9, (n,), generator=torch.Generator().manual_seed(seed))


def check(model: elision.Model, prefix: elision.Prefix, head: torch.Tensor) -> None:
    """One prompt, and a ragged batch; at once and behind the prefix."""
    for lengths in ((9,), (3, 17, 1)):
        rows = [ids(n, 7 + i) for i, n in enumerate(lengths)]
        longest = max(lengths)
        text = torch.stack([torch.nn.functional.pad(r, (longest - len(r), 0)) for r in rows])
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), (longest - len(r), 0)) for r in rows])
        parts = [torch.nn.functional.pad(torch.cat((head, r)), (longest - len(r), 0)) for r in rows]
        whole = [torch.nn.functional.pad(torch.ones(len(head) + len(r)).long(), (longest - len(r), 0)) for r in rows]
        want = model.generate(torch.stack(parts), torch.stack(whole), max_new_tokens=NEW)[:, -NEW:]
        found = model.generate(text, mask, max_new_tokens=NEW, prefix=prefix)
        assert torch.equal(found[:, :longest], text) and torch.equal(found[:, -NEW:], want)
        assert model.stats is not None and model.stats.reused_tokens == prefix.length * len(rows)


@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("passes", METHODS, ids=str)
def test_tokens_are_those_of_the_whole_prompt(passes: tuple[str, ...], target: str) -> None:
    model, head = compiled(*passes, target=target), ids(50)
    prefix = model.prefix(head)
    assert 0 < prefix.length <= 50 - AGAIN
    check(model, prefix, head)
    check(model, prefix, head)  # it was copied, not used up


def test_speculation_on_a_prefix_changes_nothing() -> None:
    evicts = "h2o:budget=24,recent=8,sinks=1,every=8"
    plain, model = compiled(evicts), compiled(evicts, "token-recycling:nodes=20", "pain-trie:nodes=20")
    fresh = drafting_of(model._interpreter, "")
    assert isinstance(fresh, Drafting)
    model.drafting = Drafting(list(fresh.drafters), Always(12))
    head, text = ids(50), ids(9, 7)[None]
    found = model.generate(text, max_new_tokens=NEW, prefix=model.prefix(head))
    assert model.stats is not None and model.stats.accepted > 5
    assert torch.equal(found, plain.generate(text, max_new_tokens=NEW, prefix=plain.prefix(head)))


@pytest.mark.parametrize("passes", [(), ("h2o:budget=24,recent=8",), ("kv-quant",)], ids=str)
def test_a_file_gives_it_back(passes: tuple[str, ...], tmp_path: Path) -> None:
    model, head, path = compiled(*passes), ids(50), tmp_path / "head.safetensors"
    made = model.prefix(head)
    made.save(path)
    again = elision.load_prefix(path)
    assert again.ids == head.tolist() and again.length == made.length and again.nbytes == made.nbytes
    check(model, again, head)
    assert list(tmp_path.iterdir()) == [path]


def test_it_belongs_to_its_model() -> None:
    head, text = ids(50), ids(4)[None]
    plain, evicts = compiled(), compiled("h2o:budget=24,recent=8")
    with pytest.raises(BadInput, match="the prefix holds .* as KV"):
        plain.generate(text, prefix=evicts.prefix(head))
    torch.manual_seed(4)
    other = elision.compile(tiny(num_hidden_layers=3, initializer_range=0.13))
    with pytest.raises(BadInput, match="another model"):
        plain.generate(text, prefix=other.prefix(head))
    assert compiled(target="reference").fingerprint == plain.fingerprint  # the states are the same
    check(plain, compiled(target="reference").prefix(head), head)


def test_files_that_are_no_prefix(tmp_path: Path) -> None:
    model, path, text = compiled("h2o:budget=24,recent=8"), tmp_path / "head.safetensors", ids(4)[None]
    with pytest.raises(BadInput, match="not a file"):
        elision.load_prefix(path)
    path.write_bytes(b"no")
    with pytest.raises(ArtefactError, match="not a prefix"):
        elision.load_prefix(path)
    model.prefix(ids(50)).save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata()
    good = load_file(path)
    for name, change, why in (
        ("kv_0/len_k", lambda a: a + 1000, "more entries"),
        ("kv_1/pos", lambda a: a - 1, "positions"),
        ("kv_1/score", lambda a: a[..., :16], "arrays"),
    ):
        save_file({**good, name: change(good[name]).contiguous()}, path, about)
        with pytest.raises(BadInput, match=why):
            model.generate(text, prefix=elision.load_prefix(path))
    save_file({n: a for n, a in good.items() if not n.startswith("kv_0/")}, path, about)
    with pytest.raises(ArtefactError, match="do not agree"):
        elision.load_prefix(path)


def test_texts(llama_words: elision.Model) -> None:
    head, tails = " ".join(f"t{i:03}" for i in range(3, 27)), [" t005 t006", " t009"]
    prefix = llama_words.prefix(head)
    assert prefix.length == 24 - AGAIN
    want = llama_words.generate([head + t for t in tails], max_new_tokens=8)
    assert llama_words.generate(tails, max_new_tokens=8, prefix=prefix) == want
    assert llama_words.generate("", max_new_tokens=8, prefix=prefix) == llama_words.generate(head, max_new_tokens=8)
    with pytest.raises(BadInput, match="one text"):
        llama_words.prefix(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="made of token ids"):
        llama_words.generate("t005", prefix=llama_words.prefix(torch.arange(3, 27)))


@pytest.fixture
def llama_words(llama: object) -> elision.Model:
    return llama.compiled  # type: ignore[attr-defined,no-any-return]


def test_a_short_one_has_nothing_read() -> None:
    model, head = compiled(), ids(5)
    prefix = model.prefix(head)
    assert prefix.length == 0 and prefix.nbytes == 0
    check(model, prefix, head)
