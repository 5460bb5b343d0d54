"""Tokenizers from GGUF metadata: ids as the model's own tokenizer gives them, specials, templates, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from gguf_files import real_file
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from elision.errors import BadInput
from elision.frontend.gguf.container import GGUF
from elision.frontend.gguf.pre_tokenizer import pre_tokenizer
from elision.frontend.gguf.tokenizer import read_tokenizer
from elision.runtime.text import Tokenizer

SPACE = "\u2581"
TEXT = (
    "Hello world!  It's 12 apples, they'll cost 3.50\u20ac \u00bd \u2167 na\u00efve \u65e5\u672c\u8a9e \U0001f600\n\n"
    "\tx1y2 = f(3)  \n  def main(argv):\n    return 0\n"
)


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    found = read_tokenizer(GGUF.open(real_file()))
    assert found is not None
    return Tokenizer.from_json(*found)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoTokenizer.from_pretrained(real_file().parent, gguf_file=real_file().name)


# --- SmolLM2 ---


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Caf\u00e9 d\u00e9j\u00e0 vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("\n", [198]),
    ],
)
def test_ids_are_those_that_others_publish(smollm: Tokenizer, prompt: str, ids: list[int]) -> None:
    assert smollm.encode(prompt) == ids


def test_digits_are_cut_out_before_words(smollm: Tokenizer, theirs: Any) -> None:
    """The file says ``pre = smollm``. The reader of transformers ignores it, and differs where spaces come before digits."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    own.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True), level])
    for text in (TEXT, "a  12", "x=1  2   3", "\u0663\u00b2"):
        assert smollm.encode(text) == own.encode(text).ids
    assert smollm.encode("Hello, world 12") == theirs("Hello, world 12").input_ids
    assert smollm.encode("a  12") != theirs("a  12").input_ids


@given(st.text(st.characters(exclude_categories=["Cs", "Nd", "Nl", "No"]), max_size=40))
def test_without_digits_both_agree(smollm: Tokenizer, theirs: Any, text: str) -> None:
    assert smollm.encode(text) == theirs(text).input_ids
    assert smollm.decode(smollm.encode(text)) == theirs.decode(smollm.encode(text), skip_special_tokens=True)


def test_chat_and_special_tokens(smollm: Tokenizer, theirs: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = smollm.chat(messages)
    assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert smollm.special_tokens == theirs.special_tokens_map
    ids = smollm.encode(prompt, add_special=False)
    assert ids == theirs(prompt, add_special_tokens=False).input_ids and ids.count(1) == 3
    assert (smollm.bos_id, smollm.eos_id, smollm.pad_id) == (1, 2, 2)
    assert "<|im_start|>" not in smollm.decode(ids) and smollm.special_ids == frozenset(range(17))


# --- small vocabularies ---


def write(path: Path, model: str | None, **fields: Any) -> GGUF:
    writer = gguf.GGUFWriter(path, "llama")
    if model is not None:
        writer.add_string("tokenizer.ggml.model", model)
    for key, value in fields.items():
        name = f"tokenizer.ggml.{key}" if key != "chat_template" else "tokenizer.chat_template"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUF.open(path)


def made(path: Path, model: str, **fields: Any) -> Tokenizer:
    found = read_tokenizer(write(path, model, **fields))
    assert found is not None
    return Tokenizer.from_json(*found)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["a", "b", "c", SPACE, "ab", "bc", SPACE + "a", "abc", SPACE + "ab", "ca", "aa", "bca", SPACE + "abc", "\n\n"]
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *PIECES]
KINDS = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 1) + [4]
# Not in the order of ids: what is merged first is a matter of scores alone.
SCORES = [0.0] * 259 + [-9.0, -8.5, -8.0, -7.5, -3.0, -1.0, -2.0, -0.5, -4.0, -2.5, -6.0, -1.5, -3.5, 0.0]
SENTENCE = dict(
    tokens=TOKENS, token_type=KINDS, scores=SCORES, bos_token_id=1, eos_token_id=2, unknown_token_id=0,
)  # fmt: skip


def by_score(text: str) -> list[int]:
    """SentencePiece's rule: of all neighbours that form a piece, merge those that form the best, the leftmost first."""
    usable = {t: i for i, t in enumerate(TOKENS) if KINDS[i] in (1, 4)}
    parts = list(text.replace(" ", SPACE))
    while True:
        pairs = [(-SCORES[usable[x + y]], i) for i, (x, y) in enumerate(zip(parts, parts[1:], strict=False)) if x + y in usable]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [usable[part]] if part in usable else [3 + byte for byte in part.encode()]
    return found


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return made(tmp_path_factory.mktemp("t") / "m.gguf", "llama", **SENTENCE)


@given(st.text("abc \u00e9z", max_size=16))
def test_sentence_piece_merges_by_score(sentence: Tokenizer, text: str) -> None:
    assert sentence.encode(text, add_special=False) == (by_score(" " + text) if text else [])
    assert sentence.encode(text)[0] == 1
    assert sentence.decode(sentence.encode(text)) == text


def test_sentence_piece_without_a_space_in_front(tmp_path: Path) -> None:
    plain = made(tmp_path / "m.gguf", "llama", **SENTENCE, add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    assert plain.encode("abc a") == [*by_score("abc a"), 2]
    assert plain.decode(plain.encode(" a")) == " a"


def test_tokens_of_the_user_are_cut_out_and_have_text(sentence: Tokenizer) -> None:
    ids = sentence.encode("a\n\nb</s>", add_special=False)
    assert TOKENS.index("\n\n") in ids and ids[-1] == 2
    assert sentence.decode(ids) == "a\n\n b"  # a space in front of every piece between such tokens, as in llama.cpp


LEVEL = ["<|end|>", *"abcdefghij0123456789.,!'", "\u0120", "\u010a", "ab", "\u0120a", "12", "123", "abc"]
MERGES = ["a b", "\u0120 a", "1 2", "12 3", "ab q"]  # the last leads to no token


def level(path: Path, **fields: Any) -> Tokenizer:
    base: dict[str, Any] = dict(tokens=LEVEL, token_type=[3] + [1] * (len(LEVEL) - 1), merges=MERGES, eos_token_id=0)
    return made(path, "gpt2", **{**base, **fields})


def cut(tokenizer: Tokenizer, text: str) -> list[str]:
    return [LEVEL[i] for i in tokenizer.encode(text)]


def test_byte_level_cuts_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert cut(level(path, pre="gpt-2"), "ab 123") == ["ab", "\u0120", "123"]
    assert cut(level(path, pre="smollm"), "ab 123") == ["ab", "\u0120", "1", "2", "3"]
    assert cut(level(path, pre="llama-bpe"), "abc1234") == ["abc", "123", "4"]  # a token as a whole, though no merge makes it
    assert cut(level(path, pre="qwen2"), "abc") == ["ab", "c"]


def test_a_start_token_where_the_file_or_the_family_has_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert cut(level(path, pre="gpt-2", bos_token_id=0), "a") == ["a"]
    assert cut(level(path, pre="gpt-2", bos_token_id=0, add_bos_token=True), "a") == ["<|end|>", "a"]
    assert cut(level(path, pre="llama-bpe", bos_token_id=0), "a") == ["<|end|>", "a"]
    assert cut(level(path, pre="llama-bpe", bos_token_id=0, add_bos_token=False), "a") == ["a"]


def test_old_files_are_cut_as_gpt2_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "elision"):
        assert cut(level(tmp_path / "m.gguf"), "ab 123") == ["ab", "\u0120", "123"]
    assert "does not say how its tokenizer cuts words" in caplog.text


CUTS = ["gpt-2", "smollm", "qwen2", "stablelm2", "llama-bpe", "glm4", "tekken", "gpt-4o", "deepseek-v3", "falcon", "bloom"]


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_keeps_the_text(name: str) -> None:
    """All expressions are ones that the library can run, and no character is lost between their matches."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [tokenizers.pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in pre_tokenizer(name, Path("f")).patterns]
    found.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    pieces = found.pre_tokenizer.pre_tokenize_str(TEXT)
    assert "".join(piece for piece, _ in pieces) == TEXT and len(pieces) > 12


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert read_tokenizer(write(path, None)) is None and read_tokenizer(write(path, "none")) is None
    for model, fields, message in [
        ("bert", dict(tokens=["a"]), "tokenizers of the kind 'bert' cannot be read; expected gpt2 or llama"),
        ("gpt2", {}, "has no tokens"),
        ("gpt2", dict(tokens=["a"], pre="gpt-2"), "has no merges"),
        ("gpt2", dict(tokens=["a"], merges=["a a"], pre="new"), "way that is not known, 'new'; expected one of gpt-2"),
        ("gpt2", dict(tokens=["a", "b"], token_type=[1], merges=["a b"], pre="gpt-2"), "one entry for each of 2 tokens"),
        ("llama", dict(tokens=["a", "b"], scores=[1.0]), "scores does not have one entry for each token"),
    ]:
        with pytest.raises(BadInput, match=message):
            read_tokenizer(write(path, model, **fields))


def test_settings_are_plain_json(tmp_path: Path) -> None:
    found = read_tokenizer(write(tmp_path / "m.gguf", "llama", **SENTENCE, chat_template="{{ messages }}"))
    assert found is not None and json.loads(json.dumps(found[1])) == {
        "chat_template": "{{ messages }}",
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    }
