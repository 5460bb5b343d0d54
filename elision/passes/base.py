"""What a pass is: a frozen dataclass whose fields are its parameters, its CLI text, its manifest entry and its registry key."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any, ClassVar, get_type_hints

from elision.errors import BadInput
from elision.ir.program import Program

#: What a pass may change, in the order in which the pipeline runs them.
CHANGES = ("entries", "blocks", "tokens", "cache", "encodings", "depth", "round", "clean")


@dataclass(frozen=True)
class Pass:
    """Base of every pass. A subclass declares its facts and implements `apply`.

    ``name``: registry key; ``family``: folder; ``changes``: one of `CHANGES`, which orders the pipeline; ``quality``: what
    it does to the output (``exact``, ``distribution``, ``approximate``); ``version``: raised when its meaning changes.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    changes: ClassVar[str]
    quality: ClassVar[str] = "approximate"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not _is(value, hint):
                raise BadInput(f"pass {self.name}: {field.name}={value!r} is not of the expected type ({kind_of(hint)})")

    def apply(self, program: Program) -> None:
        """Rewrite the program. Raises BadInput when the pass finds nothing to act on, saying what it saw instead."""
        raise NotImplementedError

    @classmethod
    def example(cls, program: Program) -> Pass:
        """The least setting that does something to the program, with which it is tried whether the pass can act on it at all.
        A pass whose fields have no defaults, or whose defaults do nothing, says its own."""
        return cls()

    def text(self) -> str:
        """The pass as text, ``name:field=value,..``, without the fields that have their default."""
        fields = [f"{f.name}={shown(v)}" for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default]
        return f"{self.name}:{','.join(fields)}" if fields else self.name


REGISTRY: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Make a pass known by its name."""
    if cls.changes not in CHANGES:
        raise BadInput(f"pass {cls.name}: changes={cls.changes!r}; expected one of {', '.join(CHANGES)}")
    REGISTRY[cls.name] = cls
    return cls


def from_text(text: str) -> Pass:
    """The pass that the text names. Raises BadInput for an unknown name or field, or a value of another type."""
    name, _, rest = text.strip().partition(":")
    cls = REGISTRY.get(name)
    if cls is None:
        raise BadInput(f"unknown pass {name!r}{_closest(name, REGISTRY)}; the passes are {', '.join(sorted(REGISTRY))}")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise BadInput(f"pass {name} has no field {key!r}{_closest(key, fields)}; its fields are {known}")
        if not equals or not value:
            raise BadInput(f"pass {name}: expected {key}=VALUE, got {part!r}")
        if key in given:
            raise BadInput(f"pass {name}: {key} is given twice")
        given[key] = _read(name, key, value, hints[key])
    for field in fields.values():
        if field.name not in given and field.default is dataclasses.MISSING:
            raise BadInput(f"pass {name} needs {field.name}=VALUE, as in {name}:{field.name}={_example(hints[field.name])}")
    return cls(**given)


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


def _closest(given: str, known: Any) -> str:
    found = difflib.get_close_matches(given, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def _example(hint: Any) -> str:
    return {"int": "4", "float": "0.5", "bool": "true", "str": "TEXT"}.get(getattr(hint, "__name__", ""), "3+7-9")


def _read(name: str, key: str, value: str, hint: Any) -> Any:
    try:
        if hint is bool:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        if hint in (int, float, str):
            return hint(value)
        if hint == int | str:
            return int(value) if value.removeprefix("-").isdecimal() else value
        if hint == float | str:
            return float(value) if _NUMBER.fullmatch(value) else value
        return tuple(n for part in value.split("+") for n in _span(part))
    except (ValueError, KeyError):
        raise BadInput(f"pass {name}: {key}={value!r} is not of the expected type ({kind_of(hint)})") from None


def _is(value: Any, hint: Any) -> bool:
    if hint in (bool, str):
        return isinstance(value, hint)
    if hint in (int | str, float | str):
        return isinstance(value, hint | int) and not isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, tuple) and all(_is(v, int) for v in value)


def kind_of(hint: Any) -> str:
    """What a field's type hint asks for, in words."""
    name = getattr(hint, "__name__", str(hint))
    return "numbers such as 3+7-9" if name.startswith("tuple") else name


def _span(part: str) -> range:
    first, dash, last = part.partition("-")
    start, stop = int(first), int(last) if dash else int(first)
    if stop < start:
        raise ValueError(part)
    return range(start, stop + 1)


def shown(value: Any) -> str:
    """A field's value as it is written in the text of a pass."""
    if isinstance(value, tuple):
        runs: list[list[int]] = []
        for n in value:
            if runs and n == runs[-1][1] + 1:
                runs[-1][1] = n
            else:
                runs.append([n, n])
        return "+".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
    return str(value).lower() if isinstance(value, bool) else str(value)
