"""The generation loop: prefill, then rounds until every row has finished."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from elision.ir.drafting.model import ModelDrafting
from elision.ir.drafting.run import Counts, Drafting
from elision.ir.interp import Interpreter
from elision.ir.requests import Requests
from elision.ir.verify import Request
from elision.runtime.options import Options
from elision.runtime.prefix import Prefix
from elision.runtime.session import Session
from elision.runtime.text import StopStrings, TextStream, Tokenizer

#: Called with (row, new tokens, new text); returning False ends the row (finish reason "cancelled").
OnTokens = Callable[[int, list[int], str], bool | None]


@dataclass
class Row:
    """One sequence of a run: its prompt, its new tokens, its text so far and why it ended (None while it runs)."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None


@dataclass
class Stats:
    """What a `generate` call did. Times in seconds; ``state_bytes`` are the bytes allocated while tokens are generated,
    ``prompt_state_bytes`` those while the prompts came in. ``reused_tokens``: of the prompts, those that a prefix had read.
    ``removed``: of each prompt, the places of the tokens that edits left out, in ``edit_time``, a part of
    ``time_to_first_token``; ``prompt_tokens`` counts what the model read.

    ``turns``: rounds, counted for each row that took part. ``drafted``, ``accepted``: nodes beside the roots that were run, and
    those that became tokens; ``drafters`` has the same by drafter, and ``sizes`` counts the rounds by their nodes.
    ``draft_time``, ``verify_time``, ``commit_time`` are parts of ``decode_time``; the last two are of native rounds only.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    rounds: int = 0
    turns: int = 0
    drafted: int = 0
    accepted: int = 0
    time_to_first_token: float = 0.0
    decode_time: float = 0.0
    state_bytes: int = 0
    prompt_state_bytes: int = 0
    draft_time: float = 0.0
    verify_time: float = 0.0
    commit_time: float = 0.0
    drafters: dict[str, Counts] = field(default_factory=dict)
    sizes: Counter[int] = field(default_factory=Counter)
    finish: list[str] = field(default_factory=list)
    removed: list[list[int]] = field(default_factory=list)
    edit_time: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens after each row's first, over the time of the rounds."""
        after = self.new_tokens - len(self.finish)
        return after / self.decode_time if self.decode_time else 0.0

    @property
    def tokens_per_round(self) -> float:
        """New tokens of a row per round that it took part in (1 without speculation)."""
        after = self.new_tokens - len(self.finish)
        return after / self.turns if self.turns else 0.0


def generate(
    interpreter: Interpreter,
    prompts: list[list[int]],
    options: Options,
    tokenizer: Tokenizer | None,
    limit: int,
    on_tokens: OnTokens | None = None,
    drafting: Drafting | ModelDrafting | None = None,
    prefix: Prefix | None = None,
) -> tuple[list[Row], Stats]:
    """Continue every prompt by ``options``, up to ``limit`` positions; stops a row at EOS, a stop string or its length.
    ``prefix``: what every prompt begins with, read before."""
    start = time.perf_counter()
    longest = max(map(len, prompts))
    new = min(options.max_new_tokens, limit - longest)
    drafts = drafting.run(len(prompts)) if drafting is not None else None
    session = Session(interpreter, len(prompts), longest + new, drafts)
    begun = prefix.length if prefix is not None else 0
    if prefix is not None:
        session.begin(prefix.length, prefix.states)
    rows = [Row(list(p)) for p in prompts]
    readers = [_Reader(tokenizer, options.stop) if tokenizer is not None else None for _ in rows]
    items = _items(prompts, options)
    known = torch.zeros(len(rows), session.capacity, dtype=torch.int64)  # every row's tokens so far, for the penalties
    for line, prompt in zip(known, prompts, strict=True):
        line[: len(prompt)] = torch.tensor(prompt)
    lengths = [len(p) for p in prompts]
    stats = Stats(prompt_tokens=sum(lengths), reused_tokens=begun * len(rows), prompt_state_bytes=session.bytes())

    def requests() -> Requests:
        return Requests(items, [history(r) for r in range(len(rows))], lengths)

    def history(r: int) -> torch.Tensor:
        return known[r, : lengths[r] + len(rows[r].tokens)]

    def take(r: int, tokens: list[int]) -> None:
        """Give row r its new tokens, up to where it ends."""
        row, reader, text = rows[r], readers[r], ""
        taken: list[int] = []
        for token in tokens:
            known[r, len(row.prompt) + len(row.tokens)] = token
            taken.append(token)
            row.tokens.append(token)
            text += reader.push(token) if reader else ""
            if token in options.eos:
                row.finish = "eos"
            elif reader and reader.stopped:
                row.finish = "stop"
            elif len(row.tokens) >= min(options.max_new_tokens, limit - len(row.prompt)):
                row.finish = "length"
            if row.finish:
                text += reader.finish() if reader else ""
                break
        row.text += text
        stats.new_tokens += len(taken)
        if on_tokens is not None and on_tokens(r, taken, text) is False:
            row.finish = "cancelled"
        if row.finish and drafts is not None:
            drafts.finish(r, history(r).numpy(), lengths[r])

    logits = session.prefill([p[begun:] for p in prompts])
    stats.state_bytes = session.bytes()
    first = requests().first(logits)
    stats.time_to_first_token = time.perf_counter() - start
    decoding = time.perf_counter()
    for r, token in enumerate(first):
        take(r, [token])
    while running := {r: row.tokens[-1] for r, row in enumerate(rows) if row.finish is None}:
        produced = session.round(running, requests())
        stats.rounds += 1
        stats.turns += len(running)
        for r in running:
            before = len(rows[r].tokens)
            take(r, produced[r])
            stats.accepted += min(len(rows[r].tokens) - before, len(produced[r]) - 1)
    stats.decode_time = time.perf_counter() - decoding
    stats.finish = [row.finish or "" for row in rows]
    if drafts is not None:
        stats.drafters, stats.drafted, stats.sizes = drafts.counts, drafts.drafted, drafts.sizes
        stats.draft_time, stats.verify_time, stats.commit_time = drafts.seconds, drafts.verify_seconds, drafts.commit_seconds
    return rows, stats


def _items(prompts: list[list[int]], options: Options) -> list[Request]:
    """Every row's request, with EOS suppressed up to its least number of new tokens."""
    if not options.min_new_tokens:
        return list(options.requests)
    until = [len(prompt) + options.min_new_tokens for prompt in prompts]
    return [
        replace(q, warp=replace(q.warp, suppress=options.eos, suppress_before=position))
        for q, position in zip(options.requests, until, strict=True)
    ]


class _Reader:
    """A row's tokens to text, cut at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._stream, self._stops = TextStream(tokenizer), StopStrings(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token: int) -> str:
        return self._stops.push(self._stream.push(token))

    def finish(self) -> str:
        return self._stops.push(self._stream.finish()) + self._stops.finish()
