"""A ``tokenizer.json`` from GGUF metadata: byte-level BPE (``gpt2``) and SentencePiece BPE with byte fallback (``llama``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers

from elision.errors import BadInput
from elision.frontend.gguf.container import GGUF
from elision.frontend.gguf.pre_tokenizer import Split, pre_tokenizer

# Kinds of tokens (``tokenizer.ggml.token_type``).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "\u2581"  # SentencePiece writes a space as this character
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "sep_token": "seperator"}


def read_tokenizer(file: GGUF) -> tuple[bytes, dict[str, Any]] | None:
    """The bytes of ``tokenizer.json`` and the settings for ``elision.runtime.text.Tokenizer.from_json``; None if there is none.

    Raises BadInput for a tokenizer that this cannot reproduce.
    """
    vocabulary = _Vocabulary.read(file)
    if vocabulary is None:
        return None
    build = {"gpt2": _byte_level, "llama": _sentence_piece}.get(vocabulary.model)
    if build is None:
        raise BadInput(f"{file.path}: tokenizers of the kind {vocabulary.model!r} cannot be read; expected gpt2 or llama")
    parts = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": vocabulary.added(), **build(vocabulary)}
    parts["post_processor"] = vocabulary.around(parts["post_processor"])
    data = json.dumps(parts, ensure_ascii=False).encode()
    try:
        tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception and ValueError
        raise BadInput(f"{file.path}: its tokenizer is damaged: {error}") from error
    return data, {"chat_template": vocabulary.text("chat_template"), "special_tokens": vocabulary.special()}


class _Vocabulary:
    """The tokens of the file, checked, and what is said about them."""

    def __init__(self, file: GGUF, model: str, tokens: list[str]) -> None:
        self.file, self.model, self.tokens = file, model, tokens
        kinds = self.get("token_type")
        if kinds is None:
            kinds = np.full(len(tokens), _NORMAL)
        if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
            raise BadInput(f"{file.path}: tokenizer.ggml.token_type does not have one entry for each of {len(tokens)} tokens")
        self.kinds: list[int] = kinds.tolist()

    @classmethod
    def read(cls, file: GGUF) -> _Vocabulary | None:
        model, tokens = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "tokens"))
        if model in (None, "none", "no_vocab"):
            return None
        if not isinstance(model, str) or not isinstance(tokens, list) or not tokens:
            raise BadInput(f"{file.path}: its tokenizer has no tokens; expected a list of texts as tokenizer.ggml.tokens")
        return cls(file, model, tokens)

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str) -> str | None:
        value = self.file.metadata.get(f"tokenizer.{key}")
        return value if isinstance(value, str) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        return value if isinstance(value, bool) else default

    def role(self, name: str) -> int | None:
        value = self.get(f"{name}_token_id")
        return value if type(value) is int and 0 <= value < len(self.tokens) else None

    def special(self) -> dict[str, str]:
        """Texts of the tokens that have a role, as chat templates see them."""
        found = {role: self.role(name) for role, name in _ROLES.items()}
        return {role: self.tokens[token] for role, token in found.items() if token is not None}

    def ids(self) -> dict[str, int]:
        """Token to id; of tokens that are there twice, the first."""
        found: dict[str, int] = {}
        for token, text in enumerate(self.tokens):
            found.setdefault(text, token)
        return found

    def added(self) -> list[dict[str, Any]]:
        """Tokens that are found in a text as they are, before it is split: control tokens, which have no text of their own, and
        those that the user defined."""
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        ids = self.ids()
        return [
            {"id": token, "content": self.tokens[token], **plain, "special": kind != _USER_DEFINED}
            for token, kind in enumerate(self.kinds)
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED) and self.tokens[token] and ids[self.tokens[token]] == token
        ]

    def around(self, default: dict[str, Any] | None) -> dict[str, Any] | None:
        """The tokens that every text starts and ends with."""
        starts = self.model == "llama" or self.get("pre") in ("llama3", "llama-v3", "llama-bpe", "tekken")
        first = self.role("bos") if self.flag("add_bos_token", starts) else None
        last = self.role("eos") if self.flag("add_eos_token", False) else None
        if first is None and last is None:
            return default
        names = [None if token is None else self.tokens[token] for token in (first, last)]

        def template(*texts: tuple[str, int]) -> list[dict[str, Any]]:
            row: list[dict[str, Any]] = []
            for text, kind in texts:
                row += [{"SpecialToken": {"id": names[0], "type_id": kind}}] if names[0] is not None else []
                row += [{"Sequence": {"id": text, "type_id": kind}}]
                row += [{"SpecialToken": {"id": names[1], "type_id": kind}}] if names[1] is not None else []
            return row

        used = {self.tokens[token]: token for token in (first, last) if token is not None}
        special = {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in used.items()}
        return {
            "type": "TemplateProcessing",
            "single": template(("A", 0)),
            "pair": template(("A", 0), ("B", 1)),
            "special_tokens": special,
        }


def _bpe(ids: Mapping[str, int], merges: list[tuple[str, str]], **settings: Any) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": ids, "merges": merges, **settings,
    }  # fmt: skip


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Every byte is a character, words are cut out by expressions that ``tokenizer.ggml.pre`` names, then merged pair by pair."""
    merges, ids = vocabulary.get("merges"), vocabulary.ids()
    if not isinstance(merges, list):
        raise BadInput(f"{vocabulary.file.path}: its tokenizer has no merges; expected a list of texts as tokenizer.ggml.merges")
    pairs = [(left, right) for left, space, right in (m.partition(" ") for m in merges) if space]
    # What does not lead to a token can never be merged; the library refuses such pairs.
    known = [(left, right) for left, right in pairs if left in ids and right in ids and left + right in ids]
    split = pre_tokenizer(vocabulary.get("pre"), vocabulary.file.path)
    return {
        "normalizer": {"type": "NFC"} if split.compose else None,
        "pre_tokenizer": _sequence(split, vocabulary.flag("add_space_prefix", False)),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(ids, known, ignore_merges=split.whole_words),
    }


def _sequence(split: Split, prefix: bool) -> dict[str, Any]:
    level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": False}
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in split.patterns]
    return {"type": "Sequence", "pretokenizers": [*steps, level]}


def _sentence_piece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Spaces are characters; of all neighbours that form a token those that form the best one are merged first; what is no token
    becomes bytes."""
    scores = vocabulary.get("scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(vocabulary.tokens):
        raise BadInput(f"{vocabulary.file.path}: tokenizer.ggml.scores does not have one entry for each token")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    prefix = vocabulary.flag("add_space_prefix", True)
    unknown = vocabulary.role("unknown")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}] * prefix + [replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
            + [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix,
        },
        "model": _bpe(
            vocabulary.ids(), _ranked(vocabulary, scores.tolist()), byte_fallback=True, fuse_unk=True,
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
        ),
    }  # fmt: skip


def _ranked(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """All pairs of tokens that form a token, best formed token first, as SentencePiece prefers them."""
    ids = vocabulary.ids()
    usable = {text: token for text, token in ids.items() if vocabulary.kinds[token] in (_NORMAL, _USER_DEFINED)}
    found: list[tuple[float, int, str, str]] = []
    for text, token in usable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in usable and right in usable:
                found.append((-scores[token], token, left, right))
    found.sort(key=lambda row: (row[0], row[1], usable[row[2]]))
    return [(left, right) for _, _, left, right in found]
