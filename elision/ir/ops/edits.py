"""Ops that edit a prompt before the model reads it: which of its tokens stay. They run entries of the model on other texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from elision.ir.nodes import counts_of
from elision.ir.op import need, op, token_axis
from elision.ir.ops.guess import RunOn
from elision.ir.tokens import Tokens
from elision.ir.types import Axis, Tensor
from elision.ir.value import Graph

BATCH = 2048  # tokens of the variants of a text that are embedded together
#: How surprising each token of a text is after a prefix: ``losses(prefix, text)``.
Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _edit_type(ids: Tensor, graphs: Sequence[Graph], axis: str, keep: float, segment: int, first: int, last: int) -> Tensor:
    need(ids.dtype == "i64" and len(ids.axes) == 1 and axis.isidentifier(), f"expected ids i64[t], a name; got {ids}, {axis!r}")
    need(0 < keep <= 1 and segment >= 1 and first >= 1 and last >= 1, f"{keep=}, {segment=}, {first=}, {last=}")
    takes = graphs[0].inputs[0].type
    need(len(graphs) == 1 and isinstance(takes, Tensor) and takes.dtype == "i64", "expected one entry, which takes ids")
    return Tensor((Axis(axis, parent=token_axis(ids)),), "i64")


def _compress_type(
    ids: Tensor, *, graphs: Sequence[Graph], targets: tuple[str, ...], axis: str, keep: float, segment: int = 200, first: int = 1,
    last: int = 1, spread: float = 0.0,
) -> Tensor:  # fmt: skip
    need(0 <= spread <= 1, f"spread={spread}; expected 0 to 1")
    return _edit_type(ids, graphs, axis, keep, segment, first, last)


@op(_compress_type, makes_axis=True)
def compress(
    ids: torch.Tensor,
    *,
    targets: tuple[str, ...],
    axis: str,
    keep: float,
    segment: int = 200,
    first: int = 1,
    last: int = 1,
    spread: float = 0.0,
    run_on: RunOn,
    at: Tokens,
) -> tuple[torch.Tensor, Tokens]:
    """The tokens of every prompt that surprise the model most (LLMLingua, Jiang et al. 2023), as the new axis ``axis``.

    The ``first`` and ``last`` tokens stay (instruction and question); of all, a share ``keep``, rounded up. What lies between
    is cut into parts of ``segment`` tokens, whose shares differ by up to ``spread`` from their mean, more for parts that surprise
    more (by their perplexity in the whole prompt). In turn, of each part those tokens stay that surprise most after what is left
    of the prompt before it; ties go to the earlier one. The target gives logits ``[t, vocab]``.
    """

    def losses(prefix: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        whole = torch.cat((prefix, text))
        logits = run_on(targets[0], (whole,), Tokens.chunk([len(whole)], [0]))[0]
        return F.cross_entropy(logits[len(prefix) - 1 : -1].float(), text, reduction="none")

    index, begin = [], 0
    for n in counts_of(at)[1].tolist():
        text = ids[begin : begin + n]
        stay = torch.ones(n, dtype=torch.bool)
        if (want := max(math.ceil(keep * n - 1e-9), first + last)) < n:
            stay[first : n - last] = False
            ends = [*range(first, n - last, segment), n - last]
            parts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]
            for part, room in zip(parts, _rooms(text, parts, want - first - last, first, spread, losses), strict=True):
                found = losses(text[: part.start][stay[: part.start]], text[part])
                stay[part.start + found.argsort(descending=True, stable=True)[:room]] = True
        index.append(begin + stay.nonzero().flatten())
        begin += n
    kept = torch.cat(index)
    return kept, at.gather(kept)


def _rooms(text: torch.Tensor, parts: list[slice], room: int, first: int, spread: float, losses: Losses) -> list[int]:
    """How many tokens of each part stay, ``room`` in all."""
    lengths = [p.stop - p.start for p in parts]
    share = room / sum(lengths)
    shares = [share] * len(parts)
    if spread and len(parts) > 1:
        whole = losses(text[:first], text[first : parts[-1].stop])
        surprise = [float(whole[p.start - first : p.stop - first].mean()) for p in parts]
        order = sorted(range(len(parts)), key=lambda i: -surprise[i])
        for rank, i in enumerate(order):
            shares[i] = min(max(share + spread * (1 - 2 * rank / (len(parts) - 1)), 0.0), 1.0)
    found: list[int] = []
    for i, length in enumerate(lengths):  # what rounding leaves goes on to the parts that follow
        rest = sum(s * n for s, n in zip(shares[i:], lengths[i:], strict=True))
        found.append(min(length, round((room - sum(found)) * shares[i] * length / rest)) if rest else 0)
    return found


def _impact_type(
    ids: Tensor, words: Tensor, *, graphs: Sequence[Graph], targets: tuple[str, ...], axis: str, keep: float, segment: int = 48,
    first: int = 1, last: int = 1,
) -> Tensor:  # fmt: skip
    need(words == ids, f"expected the words of the ids, i64[t], got {words}")
    return _edit_type(ids, graphs, axis, keep, segment, first, last)


@op(_impact_type, makes_axis=True)
def impact(
    ids: torch.Tensor,
    words: torch.Tensor,
    *,
    targets: tuple[str, ...],
    axis: str,
    keep: float,
    segment: int = 48,
    first: int = 1,
    last: int = 1,
    run_on: RunOn,
    at: Tokens,
) -> tuple[torch.Tensor, Tokens]:
    """The words of every prompt without which its meaning would change most (TCRA-LLM, Liu et al. 2023), as the axis ``axis``.

    ``words [t]``: the number of the word that each token is part of. The ``first`` and ``last`` tokens stay. What lies between
    is cut into parts of about ``segment`` tokens, of whole words; the impact of a word is the distance between the embeddings of
    its part with it and without it; an embedding is the mean over tokens of the hidden states ``[t, width]`` that the target
    gives. Words go in order of their impact, least first, ties the later one, while a share ``keep`` of the tokens is left.
    """
    index, begin = [], 0
    for n in counts_of(at)[1].tolist():
        text, word = ids[begin : begin + n], words[begin : begin + n]
        stay = torch.ones(n, dtype=torch.bool)
        if math.ceil(keep * n - 1e-9) < n and n > first + last:
            ranked: list[tuple[float, int, list[int]]] = []
            for part in _parts(word, first, n - last, segment):
                tokens = [i for places in part for i in places]
                variants = [tokens, *([i for i in tokens if i not in set(places)] for places in part)]
                e = _embeddings(text, variants, lambda *given: run_on(targets[0], *given)[0])
                ranked += [(float(d), -p[0], p) for d, p in zip((e[1:] - e[0]).norm(dim=-1), part, strict=True)]
            left = n - math.ceil(keep * n - 1e-9)
            for _, _, places in sorted(ranked):
                if (left := left - len(places)) < 0:
                    break
                stay[places] = False
        index.append(begin + stay.nonzero().flatten())
        begin += n
    kept = torch.cat(index)
    return kept, at.gather(kept)


def _parts(word: torch.Tensor, first: int, end: int, segment: int) -> list[list[list[int]]]:
    """The places of the words between ``first`` and ``end``, in parts of about ``segment`` tokens; each part has two words at
    least, so that something is left without one (unless there is one word in all)."""
    places: dict[int, list[int]] = {}
    for i in range(first, end):
        places.setdefault(int(word[i]), []).append(i)
    parts: list[list[list[int]]] = [[]]
    for found in places.values():
        if len(parts[-1]) > 1 and sum(map(len, parts[-1])) + len(found) > segment:
            parts.append([])
        parts[-1].append(found)
    if len(parts) > 1 and len(parts[-1]) < 2:
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def _embeddings(text: torch.Tensor, variants: list[list[int]], run: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The mean hidden state ``[variants, width]`` of texts that are parts of one; that of nothing is 0."""
    step = max(1, BATCH // max(1, max(map(len, variants))))
    found: list[torch.Tensor] = []
    for i in range(0, len(variants), step):
        some = variants[i : i + step]
        at = Tokens.chunk([len(v) for v in some], [0] * len(some))
        flat = torch.tensor([j for v in some for j in v], dtype=torch.int64)
        h: Any = run((text[flat],), at)
        total = h.new_zeros(len(some), h.shape[1]).index_add_(0, at.row, h)
        found.append(total / torch.tensor([max(1, len(v)) for v in some])[:, None])
    return torch.cat(found)
