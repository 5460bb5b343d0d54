"""The beginning of prompts, read once: `Model.prefix`, `load_prefix`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from elision.errors import ArtefactError, BadInput
from elision.ir.contents import Contents, check
from elision.ir.interp import Interpreter
from elision.runtime.session import Session

if TYPE_CHECKING:
    from elision.runtime.model import Model

FORMAT = "1"
#: Tokens at the end of a prefix that are read again with the text behind them: it may change how the last ones are split.
AGAIN = 8


@dataclass(frozen=True)
class Prefix:
    """The states of a model after the first ``length`` of the tokens ``ids``; ``text`` is what they are, if it was given as text.

    Nothing of it has been evicted: what a method keeps depends on the whole prompt. Its scores are those of its own queries. The
    last tokens are not in the states (`AGAIN`, and those whose queries a method weighs by their distance from the prompt's end).
    """

    ids: list[int]
    text: str | None
    length: int
    states: dict[str, Contents]
    model: str  # the fingerprint of the model
    types: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(a.nbytes for arrays in self.states.values() for a in arrays.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to ``path``, a safetensors file, all of it or nothing."""
        tensors = {f"{state}/{name}": a.contiguous() for state, arrays in self.states.items() for name, a in arrays.items()}
        tensors["ids"] = torch.tensor(self.ids)
        more = {"format": FORMAT, "text": self.text, "length": self.length, "model": self.model, "types": self.types}
        partial = f"{os.fspath(path)}.partial"
        save_file(tensors, partial, {"elision": json.dumps(more)})
        os.replace(partial, path)

    def must_fit(self, model: Model) -> None:
        """Raises BadInput if it is of another model, or of other states."""
        types = _types(model)
        for name in sorted(self.types.keys() | types.keys()):
            mine, its = self.types.get(name), types.get(name)
            if mine != its:
                raise BadInput(f"the prefix holds {name} as {mine}, but {model.program.name} has {its}: make it anew")
        if self.model != model.fingerprint:
            raise BadInput(f"the prefix was made by another model than {model.program.name}, or by other passes: make it anew")
        for name, arrays in self.states.items():
            check(model.program.states[name], self.length, arrays)

    def before(self, texts: Sequence[str]) -> list[str]:
        """The whole texts of prompts."""
        if self.text is None:
            raise BadInput("the prefix was made of token ids: give token ids, or make it of a text")
        return [self.text + text for text in texts]

    def must_begin(self, prompts: list[list[int]]) -> None:
        """Raises BadInput unless all of these prompts begin with the tokens that were read."""
        for i, ids in enumerate(prompts):
            if ids[: self.length] != self.ids[: self.length]:
                raise BadInput(f"with prompt {i} behind it the prefix is split into other tokens than alone: end it after a word")


def read(model: Model, interpreter: Interpreter, ids: list[int], text: str | None) -> Prefix:
    """`Model.prefix` of token ids."""
    length = max(0, len(ids) - max(AGAIN, _last(model)))
    session = Session(interpreter, 1, length + 1)
    if length:
        session.read([ids[:length]], [len(ids)])
    return Prefix(ids, text, length, session.contents() if length else {}, model.fingerprint, _types(model))


def load_prefix(path: str | os.PathLike[str]) -> Prefix:
    """Open what `Prefix.save` wrote. It is compared with a model when it is used (`Model.generate`).

    Raises BadInput for a file that is not there, ArtefactError for one that is damaged, foreign or of another version.
    """
    if not os.path.isfile(path):
        raise BadInput(f"{os.fspath(path)} is not a file")
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["elision"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] != FORMAT:
            raise ArtefactError(f"{os.fspath(path)} is a prefix of format {about['format']!r}, this Elision reads {FORMAT}")
        ids, length = tensors.pop("ids").tolist(), about["length"]
        states: dict[str, Contents] = {}
        for name, array in tensors.items():
            state, _, inner = name.partition("/")
            states.setdefault(state, {})[inner] = array
        typed = isinstance(about["types"], dict) and (not length or states.keys() == about["types"].keys())
        if not typed or type(length) is not int or not 0 <= length <= len(ids) or not all(type(i) is int for i in ids):
            raise ValueError("its header and its tensors do not agree")
        return Prefix(ids, about["text"], length, states, about["model"], about["types"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as err:
        raise ArtefactError(f"{os.fspath(path)} is not a prefix that Elision wrote: {err}") from err


def _types(model: Model) -> dict[str, str]:
    return {name: repr(type) for name, type in model.program.states.items()}


def _last(model: Model) -> int:
    """Of how many of a prompt's last tokens the queries are weighed apart."""
    return max((v.attr("last", 0) for g in model.program.graphs().values() for v in g.values if v.op == "observe"), default=0)
