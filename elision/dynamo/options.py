"""The options of ``torch.compile(model, backend="elision", options={...})``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elision.compiler import TARGETS
from elision.errors import BadInput
from elision.passes.pipeline import resolve

FALLBACKS = ("eager", "inductor")


@dataclass(frozen=True)
class Options:
    """``passes``, ``target``, ``threads``, ``calibration``: as in `elision.compile` (``threads``: torch's number, by default).
    ``fallback``: what runs graphs that are not raised, ``eager`` or ``inductor``."""

    passes: tuple[Any, ...] = ()
    target: str = "cpu"
    threads: int | None = None
    calibration: torch.Tensor | Sequence[str] | None = None
    fallback: str = "eager"

    @staticmethod
    def read(given: Mapping[str, Any] | None) -> Options:
        """The options as `torch.compile` hands them on. Raises BadInput for one that is unknown or cannot be used."""
        known = [f.name for f in dataclasses.fields(Options)]
        unknown = [name for name in given or {} if name not in known]
        if unknown:
            raise BadInput(f"torch.compile options {', '.join(map(repr, unknown))}; the options are {', '.join(known)}")
        found = Options(**given) if given else Options()
        if found.target not in TARGETS:
            raise BadInput(f"unknown target {found.target!r}; the targets are {', '.join(TARGETS)}")
        if found.fallback not in FALLBACKS:
            raise BadInput(f"unknown fallback {found.fallback!r}; expected {' or '.join(FALLBACKS)}")
        return dataclasses.replace(found, passes=tuple(resolve(found.passes)))

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two programs of one module different."""
        passes = tuple(p.text() for p in self.passes)
        return passes, self.target, self.threads, id(self.calibration) if self.calibration is not None else None
