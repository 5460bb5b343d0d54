"""The arguments of `generate`, checked and completed from the model's own generation defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index
from typing import Any

from elision.errors import BadInput
from elision.ir.verify import Request
from elision.ir.warp import Warp

#: New tokens when neither the caller nor the model's generation config says how many.
DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Options:
    """One call's settings. ``eos``: ids that end a sequence; ``requests[r]``: how row r draws its tokens."""

    max_new_tokens: int
    min_new_tokens: int
    eos: tuple[int, ...]
    pad: int
    stop: tuple[str, ...]
    requests: tuple[Request, ...]


def resolve(
    defaults: Mapping[str, Any],
    *,
    rows: int,
    copies: int,
    longest: int,
    max_new_tokens: int | None,
    min_new_tokens: int,
    do_sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    repetition_penalty: float | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    stop: str | Sequence[str] | None,
    seed: int | Sequence[int],
) -> Options:
    """Complete the arguments of `generate` for ``rows`` prompts, ``copies`` sequences each, the longest of ``longest`` tokens.

    None means the model's generation config. Raises BadInput naming the argument.
    """
    greedy = _greedy(defaults, do_sample, temperature)
    given: dict[str, Any] = {
        "temperature": temperature or None,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    Warp(**{n: v for n, v in given.items() if v is not None})  # refuses what is out of range, used or not
    used = ("repetition_penalty",) if greedy else tuple(given)
    settled = {n: _or(given[n], defaults, n, None) for n in used}
    warp = Warp(**{n: v for n, v in settled.items() if v is not None})
    new = _or(max_new_tokens, defaults, "max_new_tokens", None)
    if new is None:
        limit = defaults.get("max_length")
        new = limit - longest if limit and limit > longest else DEFAULT_NEW_TOKENS
    if not isinstance(new, Integral) or new < 1:
        raise BadInput(f"max_new_tokens={new!r}; expected an integer of at least 1")
    if not isinstance(min_new_tokens, Integral) or not 0 <= min_new_tokens <= new:
        raise BadInput(f"min_new_tokens={min_new_tokens!r}; expected an integer from 0 to max_new_tokens={new}")
    eos = _ids(defaults.get("eos_token_id") if eos_token_id is None else eos_token_id)
    pad = _or(pad_token_id, defaults, "pad_token_id", eos[0] if eos else 0)
    if not isinstance(pad, Integral):
        raise BadInput(f"pad_token_id={pad!r}; expected a token id")
    keys = _keys(seed, rows, copies)
    stops: Any = () if stop is None else stop if isinstance(stop, Iterable) and not isinstance(stop, str) else (stop,)
    return Options(
        max_new_tokens=int(new),
        min_new_tokens=int(min_new_tokens),
        eos=eos,
        pad=int(pad),
        stop=tuple(stops),
        requests=tuple(Request(warp, greedy, *key) for key in keys),
    )


def _greedy(defaults: Mapping[str, Any], do_sample: bool | None, temperature: float | None) -> bool:
    if temperature == 0:
        if do_sample:
            raise BadInput("temperature=0 is greedy, but do_sample=True asks for sampling: leave one of them out")
        return True
    if do_sample is not None:
        return not do_sample
    return temperature is None and not defaults.get("do_sample", False)


def _or(given: Any, defaults: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    found = defaults.get(name) if given is None else given
    return otherwise if found is None else found


def _ids(given: int | Sequence[int] | None) -> tuple[int, ...]:
    try:
        return () if given is None else tuple(map(index, given)) if isinstance(given, Iterable) else (index(given),)
    except TypeError:
        raise BadInput(f"eos_token_id={given!r}; expected a token id, a list of them, or [] for none") from None


def _keys(seed: int | Sequence[int], rows: int, copies: int) -> list[tuple[int, int]]:
    """The noise key (seed, row) of every sequence: one seed counts the sequences, a seed per row counts its copies."""
    try:
        if not isinstance(seed, Iterable):
            return [(index(seed), r) for r in range(rows * copies)]
        seeds = list(map(index, seed))
    except TypeError:
        raise BadInput(f"seed={seed!r}; expected an integer, or one per row ({rows})") from None
    if len(seeds) != rows:
        raise BadInput(f"seed: expected one integer or one per row ({rows}), got {len(seeds)}")
    return [(s, c) for s in seeds for c in range(copies)]
