"""Text in and out: the tokenizer of an artefact, and streaming of generated text up to a stop string.

Everything comes from two JSON members of the artefact (``tokenizer.json``, ``text.json``) and runs through
the ``tokenizers`` and ``jinja2`` libraries alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from elision.errors import ArtefactError, BadInput
from elision.runtime.chat import ChatTemplate

_INCOMPLETE = "\ufffd"


class Tokenizer:
    """A tokenizer with its settings: ``chat_template``, Jinja text or None, and ``special_tokens``, such as
    ``{"eos_token": "<|im_end|>"}``, which the template sees as variables. Safe to share between threads.
    """

    def __init__(self, core: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        if not isinstance(settings, Mapping) or set(settings) != {"chat_template", "special_tokens"}:
            raise ArtefactError("the text settings must be exactly chat_template and special_tokens")
        template, special = settings["chat_template"], settings["special_tokens"]
        texts = [*special, *special.values()] if isinstance(special, Mapping) else [special]
        if not isinstance(template, str | None) or not all(isinstance(text, str) for text in texts):
            raise ArtefactError("the chat template and the special tokens in the text settings must be text")
        core.no_truncation()  # both may have been left on in tokenizer.json by whoever used it last
        core.no_padding()
        self._core = core
        self.chat_template: str | None = template
        self.special_tokens: dict[str, str] = dict(special)

    @classmethod
    def from_json(cls, data: bytes, settings: Mapping[str, Any]) -> Tokenizer:
        """From the bytes of ``tokenizer.json`` and the decoded ``text.json``. Raises `ArtefactError`."""
        try:
            core = tokenizers.Tokenizer.from_buffer(bytes(data))
        except Exception as error:  # the library raises bare Exception and ValueError
            raise ArtefactError(f"tokenizer.json cannot be read by the tokenizers library: {error}") from error
        return cls(core, settings)

    def to_members(self) -> dict[str, bytes]:
        """The archive members from which `from_json` makes this tokenizer again."""
        settings = {"chat_template": self.chat_template, "special_tokens": self.special_tokens}
        return {
            "tokenizer.json": self._core.to_str().encode(),
            "text.json": json.dumps(settings, indent=1).encode(),
        }

    def agrees(self, other: Tokenizer) -> bool:
        """Whether both have the same tokens under the same ids."""
        return self._core.get_vocab(with_added_tokens=True) == other._core.get_vocab(with_added_tokens=True)

    def special_id(self, role: str) -> int | None:
        """The id of the special token of a role such as ``eos_token``, or None."""
        text = self.special_tokens.get(role)
        return None if text is None else self._core.token_to_id(text)

    @property
    def bos_id(self) -> int | None:
        return self.special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self.special_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self.special_id("pad_token")

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The token ids of ``text``; give ``add_special=False`` for text that `chat` made."""
        if not isinstance(text, str):
            raise BadInput(f"a prompt must be text, got {type(text).__name__}")
        try:
            return list(self._core.encode(text, add_special_tokens=add_special).ids)
        except TypeError as error:  # a lone surrogate, which has no UTF-8
            raise BadInput("the prompt is not valid Unicode: it has half of a surrogate pair") from error

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``; ids outside the vocabulary have no text."""
        try:
            return self._core.decode([int(token) for token in ids], skip_special_tokens=skip_special)
        except OverflowError as error:
            raise BadInput(f"token ids must be between 0 and 2**32 - 1: {error}") from error

    def words(self, ids: Sequence[int]) -> list[int]:
        """The number of the word that each token is part of: one begins after white space, or with it."""
        found: list[int] = []
        alone = [self.decode([token], skip_special=False) for token in ids]
        for i in range(len(ids)):
            joint = self.decode(ids[i - 1 : i + 1], skip_special=False)[len(alone[i - 1]) :] if i else ""
            begins = i == 0 or joint[:1].isspace() or alone[i - 1][-1:].isspace()
            found.append((found[-1] if found else -1) + begins)
        return found

    def chat(self, messages: str | Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation: ``[{"role": ..., "content": ...}, ...]``, or one user message.

        Renders the model's chat template with the variables, filters and sandbox of transformers'
        ``apply_chat_template``, with ``None`` fields left out. Encode the result with ``add_special=False``.
        Raises `BadInput` if there is no template or it refuses the conversation.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self._template.render(messages, self.special_tokens, add_generation_prompt)

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise BadInput("this model has no chat template: give a plain prompt instead of a conversation")
        return ChatTemplate(self.chat_template)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids that `decode` leaves out when it skips special tokens."""
        added = self._core.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """The ids of byte-fallback tokens such as ``<0xE2>``: a run of them is text only as a whole."""
        decoder = self._core.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return frozenset()
        ids = (self._core.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(token for token in ids if token is not None)

    def has_text(self, token: int, skip_special: bool) -> bool:
        """Whether `decode` uses ``token`` at all."""
        return self._core.id_to_token(token) is not None and not (skip_special and token in self.special_ids)


class TextStream:
    """Generated tokens to text, piece by piece: `push` every token, then `finish`.

    The pieces together are ``tokenizer.decode`` of all the tokens, and no piece shows a character of which
    only some bytes have come. A push decodes a few tokens, however long the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # The window: the last tokens, from a character's start on. A decoder may treat the first token of a
        # text in a special way (drop its space), so one settled piece stays in front of what is new.
        self._window: list[int] = []
        self._settled = 0  # how many tokens of the window are in pieces already
        self._sent = 0  # how many characters of the window's text are out

    def push(self, token: int) -> str:
        """The text that ``token`` settles, "" while a character is incomplete."""
        if not self._tokenizer.has_text(token, self._skip_special):
            return ""
        self._window.append(token)
        if token in self._tokenizer.byte_ids:
            return ""  # one bad byte later turns the whole run into replacement characters
        text = self._decode()
        settled = len(text.rstrip(_INCOMPLETE))
        piece = text[self._sent : settled]
        self._sent = max(self._sent, settled)
        if piece and settled == len(text):
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._sent = len(self._decode())
        return piece

    def finish(self) -> str:
        """What is still held back, incomplete characters included."""
        piece = self._decode()[self._sent :]
        self._sent += len(piece)
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special)


class StopStrings:
    """Cuts streamed text at the first stop string to be complete; ``stopped`` says when that has happened.

    Text that may be the start of a stop string is held back until that is clear. How the text is cut into
    pieces does not matter.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise BadInput(f"stop strings must be text that is not empty, got {self._stops!r}")
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is certainly before any stop string; "" once stopped."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        hold = next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def finish(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held
