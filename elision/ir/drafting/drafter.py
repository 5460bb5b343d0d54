"""What a drafter is, and the drafters by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from elision.errors import BadInput
from elision.ir.drafting.proposal import Array, Proposal
from elision.ir.drafting.rates import Rates


class Drafter:
    """Proposes trees from what it has seen. Its memory outlives a run: later requests begin with what earlier ones taught."""

    name: ClassVar[str]
    rates: Rates
    template: Proposal | None = None  # what every proposal is a part of, kinds as with the least that is known

    def propose(self, history: Array, prompt: int, depth: int) -> Proposal | None:
        """A tree of up to ``depth`` levels under the last token of ``history`` (int64; its first ``prompt`` tokens were given),
        or None. At most 64 nodes are of use."""
        raise NotImplementedError

    def see(self, nodes: Array, best: Array) -> None:
        """Nodes ``[n]`` that were run, roots first, and the likeliest tokens ``[n, k]`` after each."""

    def advance(self, history: Array, new: int) -> None:
        """The last ``new`` tokens of a row's history have just been committed."""

    def finish(self, history: Array, prompt: int) -> None:
        """A row has ended."""

    def tables(self) -> Mapping[str, Array]:
        """Its memory by name, for those that draft in its place."""
        return {}

    def nbytes(self) -> int:
        """Bytes of its tables."""
        return sum(table.nbytes for table in self.tables().values())


DRAFTERS: dict[str, Callable[..., Drafter]] = {}


def register(cls: type[Drafter]) -> type[Drafter]:
    """Make a drafter known by its name."""
    DRAFTERS[cls.name] = cls
    return cls


def make(text: str, vocabulary: int) -> Drafter:
    """The drafter that ``name:field=value,..`` describes. Raises BadInput for one that is not known."""
    name, _, rest = text.partition(":")
    if name not in DRAFTERS:
        raise BadInput(f"unknown drafter {name!r}; the drafters are {', '.join(sorted(DRAFTERS))}")
    takes = inspect.signature(DRAFTERS[name]).parameters
    fields = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
    try:
        return DRAFTERS[name](vocabulary, **{key: int(value) for key, value in fields.items()})
    except (TypeError, ValueError) as err:
        raise BadInput(f"drafter {text!r}: {err}; its fields are {', '.join(list(takes)[1:]) or 'none'}, integers") from None


def text_of(name: str, fields: Sequence[tuple[str, object]]) -> str:
    """The description that `make` reads."""
    return name + ":" + ",".join(f"{key}={value}" for key, value in fields) if fields else name
