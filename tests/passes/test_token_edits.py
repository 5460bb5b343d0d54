"""Methods that edit prompts: which tokens stay, against a search by hand; what the model reads then; what the stats say."""

from __future__ import annotations

import functools
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from programs import tiny_scorer

import elision
from elision.errors import BadInput
from elision.ir.canonical import canonical
from elision.ir.mask import Mask
from elision.ir.parser import parse_program
from elision.ir.printer import print_program
from elision.passes.pipeline import run
from elision.runtime.text import Tokenizer
from tests.passes.small import ragged, tiny

LINGUA = "llmlingua:keep=0.5,segment=6,first=2,last=3"
TCRA = "tcra:keep=0.6,segment=8,first=2,last=3"


@functools.cache
def original() -> Any:
    return tiny(num_hidden_layers=3, initializer_range=0.15)


@functools.cache
def compiled(*passes: str, target: str = "reference") -> elision.Model:
    return elision.compile(original(), passes=list(passes), target=target, threads=2)


def prompt(n: int = 30) -> torch.Tensor:
    return torch.randint(1, 64, (1, n), generator=torch.Generator().manual_seed(n))


def left(model: elision.Model, ids: torch.Tensor) -> list[int]:
    """The places of the tokens that the model reads."""
    model.generate(ids, max_new_tokens=1)
    assert model.stats is not None
    places = [i for i in range(ids.shape[1]) if i not in set(model.stats.removed[0])]
    assert model.stats.prompt_tokens == len(places)
    return places


@torch.inference_mode()
def losses(ids: list[int]) -> list[float]:
    """Of every token, the first excepted."""
    logits = original()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [0.0] + [-float(logits[i, t]) for i, t in enumerate(ids[1:])]


def by_hand(ids: list[int], room: list[int], segment: int = 6, first: int = 2, last: int = 3) -> list[int]:
    n, places = len(ids), list(range(first))
    for j, begin in enumerate(range(first, n - last, segment)):
        part = list(range(begin, min(begin + segment, n - last)))
        found = losses([ids[i] for i in [*places, *part]])[len(places) :]
        order = sorted(range(len(part)), key=lambda i: -found[i])  # noqa: B023
        places += sorted(part[i] for i in order[: room[j]])
    return places + list(range(n - last, n))


def test_what_surprises_stays() -> None:
    """Parts of 6, 6, 6, 6 and 1 tokens; 15 - 5 of them stay, of equal shares."""
    ids = prompt()
    found = left(compiled(f"{LINGUA},spread=0.0"), ids)
    assert found == by_hand(ids[0].tolist(), [2, 2, 3, 3, 0]) or found == by_hand(ids[0].tolist(), [2, 3, 2, 3, 0])
    assert len(found) == 15


def test_surprising_parts_get_more() -> None:
    ids = prompt()
    whole = losses(ids[0].tolist())
    surprise = [sum(whole[b : min(b + 6, 27)]) / len(whole[b : min(b + 6, 27)]) for b in range(2, 27, 6)]
    found = left(compiled(f"{LINGUA},spread=0.4"), ids)
    room = [len([i for i in found if b <= i < min(b + 6, 27)]) for b in range(2, 27, 6)]
    ranked = [room[j] for j in sorted(range(4), key=lambda j: -surprise[j])]  # the fifth has but one token
    assert ranked == sorted(ranked, reverse=True) and ranked[0] > ranked[-1]
    assert sum(room) == 10 and found == by_hand(ids[0].tolist(), room)


@pytest.mark.parametrize("method", ["llmlingua:segment=100", "tcra:segment=100"])
def test_what_stays_is_nested(method: str) -> None:
    ids, before = prompt(), set[int]()
    for keep in (0.1, 0.3, 0.6, 0.9):
        found = left(compiled(f"{method},keep={keep},first=2,last=3"), ids)
        assert len(found) == max(ceil(keep * 30 - 1e-9), 5) and before <= set(found) and {0, 1, 27, 28, 29} <= set(found)
        before = set(found)


@torch.inference_mode()
def test_words_without_impact_go() -> None:
    """Every token is a word here: parts of 8, 8 and 9 (the last has one more, since one word alone is no text)."""
    ids = prompt()
    text = ids[0].tolist()

    def mean(tokens: list[int]) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        hook = original().model.norm.register_forward_pre_hook(lambda m, a: kept.append(a[0]))
        original().model(torch.tensor([tokens]))
        hook.remove()
        return kept[0][0].mean(0)

    ranked = []
    for a, b in ((2, 10), (10, 18), (18, 27)):
        whole = mean(text[a:b])
        ranked += [(float((mean(text[a:i] + text[i + 1 : b]) - whole).norm()), -i) for i in range(a, b)]
    gone = {-i for _, i in sorted(ranked)[:12]}
    assert left(compiled(TCRA), ids) == [i for i in range(30) if i not in gone]


EDITED = [(LINGUA,), (TCRA,), (LINGUA, TCRA), (TCRA, "fastv:keep=0.5"), (LINGUA, "int8", "kv-quant")]


@pytest.mark.parametrize(
    "texts,target",
    [*((t, "cpu") for t in EDITED), *(pytest.param(t, "reference", marks=pytest.mark.nightly) for t in EDITED)],
)
def test_the_model_reads_what_is_left(texts: tuple[str, ...], target: str) -> None:
    """As an ordinary prompt: new tokens are those of the edited prompt given to the model without the edit."""
    model, rest = compiled(*texts, target=target), [t for t in texts if not t.startswith(("llmlingua", "tcra"))]
    ids, mask = ragged()
    found = model.generate(ids, attention_mask=mask, max_new_tokens=9)
    assert isinstance(found, torch.Tensor) and model.stats is not None and torch.equal(found[:, :30], ids)
    removed, plain = model.stats.removed, compiled(*rest, target=target)
    assert [bool(r) for r in removed] == [bool(n > 5) for n in (7, 30, 1, 18)] and model.stats.edit_time > 0
    for row in range(4):
        whole = ids[row][mask[row].bool()]
        kept = [i for i in range(len(whole)) if i not in set(removed[row])]
        assert torch.equal(plain.generate(whole[kept][None], max_new_tokens=9)[0, len(kept) :], found[row, 30:])


def test_native_code_edits_alike() -> None:
    for text in (LINGUA, TCRA):
        assert left(compiled(text), prompt()) == left(compiled(text, target="cpu"), prompt())
    native = compiled(TCRA, target="cpu").native
    assert native is not None and "embed" in native.schedules and not native.hosts["embed"]


def test_drafts_change_nothing() -> None:
    model, ids = compiled(LINGUA, "token-recycling:nodes=20"), prompt()
    assert torch.equal(model.generate(ids, max_new_tokens=30), compiled(LINGUA).generate(ids, max_new_tokens=30))


@pytest.mark.parametrize("text", ["llmlingua:keep=1.0", "tcra:keep=1.0"])
def test_the_identity(text: str) -> None:
    assert canonical(compiled(text).program) == canonical(compiled().program)
    assert left(compiled(text), prompt()) == list(range(30))


def test_short_prompts_stay() -> None:
    assert left(compiled(LINGUA), prompt(5)) == list(range(5)) and left(compiled(TCRA), prompt(5)) == list(range(5))


def test_as_text_and_in_an_artefact(tmp_path: Path) -> None:
    model = compiled(LINGUA, TCRA, target="cpu")
    assert len(model.program.edits) == 2 and model.program.quality == "approximate"
    assert parse_program(print_program(model.program)) == model.program
    model.save(tmp_path / "edited.elision")
    again = elision.load(tmp_path / "edited.elision")
    assert left(again, prompt()) == left(model, prompt())


def test_words_begin_at_white_space() -> None:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(["the the cat"], tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet))
    tokenizer = Tokenizer(core, {"chat_template": None, "special_tokens": {}})
    text = "the cats the\nxy z"
    ids = tokenizer.encode(text)
    words = [(tokenizer.decode([i]), w) for i, w in zip(ids, tokenizer.words(ids), strict=True)]
    joined = ["".join(t for t, w in words if w == n).strip() for n in range(words[-1][1] + 1)]
    assert [w for w in joined if w] == text.split()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("llmlingua:keep=0.0", "keep=0.0; expected a share"),
        ("llmlingua:spread=2.0", "spread=2.0"),
        ("llmlingua:segment=0", "segment=0"),
        ("tcra:first=0", "first=0"),
        ("tcra:keep=1.1", "keep=1.1; expected a share"),
    ],
)
def test_bad_settings(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        compiled(text)


@pytest.mark.parametrize("text", ["llmlingua", "tcra"])
def test_encoders_read_no_prompts(text: str) -> None:
    with pytest.raises(BadInput, match="does not generate"):
        run(tiny_scorer(mask=Mask("full"))[0], [text])
