"""How byte-level tokenizers cut a text into words before they merge, by the name that GGUF gives it (``tokenizer.ggml.pre``)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from elision.errors import BadInput

log = logging.getLogger("elision")


@dataclass(frozen=True)
class Split:
    """Expressions that cut a text, one after another: every match and what lies between two is a piece of its own.

    ``compose``: Unicode is composed first (NFC). ``whole_words``: a word that is a token is that token, whatever the merges say.
    """

    patterns: tuple[str, ...]
    compose: bool = False
    whole_words: bool = False


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SLASHED = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)

#: GPT-2's own expression; the digits of the families after it come one by one, or in threes.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ONE_DIGIT = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_THREE_DIGITS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPLITS: dict[tuple[str, ...], Split] = {
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "roberta-bpe"): Split((_GPT2,)),
    # SmolLM's tokenizer cuts digits out before it looks for words, so "  1" is two spaces and a digit. The reader of transformers
    # ignores the name and cuts one space and " 1": ids differ where spaces are followed by digits.
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): Split((r"\p{N}", _GPT2)),
    ("qwen2",): Split((_ONE_DIGIT,), compose=True),
    ("stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "grok-2"): Split((_ONE_DIGIT,)),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"): Split((_THREE_DIGITS,), whole_words=True),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): Split((_THREE_DIGITS,)),
    ("tekken",): Split((rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}|{_SLASHED}",), whole_words=True),
    ("gpt-4o", "llama4"): Split(
        (rf"{_CASED[0]}{_CONTRACTION}?|{_CASED[1]}{_CONTRACTION}?|\p{{N}}{{1,3}}|{_SLASHED}",)
    ),
    ("deepseek-v3",): Split((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK)),
    ("falcon",): Split((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    ("bloom", "poro-chat", "gpt3-finnish"): Split((" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",)),
}


def pre_tokenizer(name: object, path: Path) -> Split:
    """The cuts of this name; GPT-2's where there is none, as in old files. Raises BadInput for a name that is not known."""
    if name in (None, "default"):
        log.warning("%s does not say how its tokenizer cuts words: GPT-2's way is taken", path)
        name = "gpt-2"
    for names, split in _SPLITS.items():
        if name in names:
            return split
    known = ", ".join(x for names in _SPLITS for x in names)
    raise BadInput(f"{path}: its tokenizer cuts words in a way that is not known, {name!r}; expected one of {known}")
