"""What speculation needs of this machine: the drafters of a program, and what its calls cost by their number of nodes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import threading
import time
import weakref
import zlib
from pathlib import Path

import numpy as np
import torch

from elision.ir.drafting import continuations, lookup, recycling, trigrams  # noqa: F401  (they register their drafters)
from elision.ir.drafting.drafter import make
from elision.ir.drafting.growth import growth_of
from elision.ir.drafting.model import ModelDrafting
from elision.ir.drafting.policy import SIZES, Policy
from elision.ir.drafting.proposal import Array, chain
from elision.ir.drafting.run import Drafting
from elision.ir.interp import Interpreter
from elision.ir.program import Program, drafting, guesses
from elision.ir.requests import Requests
from elision.ir.tokens import Tokens
from elision.ir.verify import Request
from elision.runtime.session import Session

log = logging.getLogger("elision")
_RUNS, _BEFORE = 8, 64
_made: weakref.WeakSet[Drafting | ModelDrafting] = weakref.WeakSet()


def drafting_of(interpreter: Interpreter, key: str) -> Drafting | ModelDrafting | None:
    """The drafters of the interpreter's program with a policy for this machine, or None if its drafts are empty. ``key``: what
    else the time of a call depends on (code, threads); times are kept under it in the user's cache directory."""
    program = interpreter.program
    methods = drafting(program.round)[1] if program.round is not None else ()
    if not methods:
        return None
    types = repr(sorted((name, str(type)) for name, type in program.params.items()))
    key = f"{key} {zlib.crc32(types.encode())}"
    policy, vocabulary = Policy(lambda: step_seconds(interpreter, key)), program.meta["vocab"]
    if targets := guesses(program):
        name, growth = methods[0].partition(":")[0], growth_of(methods[0])
        found: Drafting | ModelDrafting = ModelDrafting(
            name, growth, policy, len(targets), vocabulary, program.meta.get("draft_positions")
        )
    else:
        found = Drafting([make(m, vocabulary) for m in methods], policy)
    _made.add(found)
    return found


def _forked() -> None:
    for found in _made:  # whoever held a lock is not in the child
        found.lock = threading.Lock()
        found.policy.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def step_seconds(interpreter: Interpreter, key: str) -> Array:
    """Seconds of a round's call over each of `SIZES` nodes after a short prompt; measured once per ``key`` and machine."""
    path = _path(key)
    try:
        found = json.loads(path.read_text())
        if len(found) == len(SIZES) and all(isinstance(x, float) and x > 0 for x in found):
            return np.array(found)
    except (OSError, ValueError, TypeError):
        pass
    log.info("measuring what a step of 1 to %d nodes costs", SIZES[-1])
    times = _measure(interpreter)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(times.tolist()))
    except OSError as err:
        log.info("the times are not kept: %s", err)
    return times


def _measure(interpreter: Interpreter) -> Array:
    """Lower quartiles of ``_RUNS`` rounds of each size. All runs write one text, whose next tokens the first of them finds out
    without drafts, so that every guess can be wrong; sizes come in another order each time, since contexts and clocks move on."""
    positions, vocabulary = interpreter.program.meta["positions"], interpreter.program.meta["vocab"]
    before = max(1, min(_BEFORE, positions - 1 - len(SIZES)))
    drafts = _Chain(interpreter.program)
    text: list[int] = []
    seen = np.empty((_RUNS, len(SIZES)))
    for run in range(-1, _RUNS):
        session = Session(interpreter, 1, before + len(SIZES) + SIZES[-1], drafts)  # type: ignore[arg-type]
        session.prefill([[0] * before])
        last = 0
        for turn, i in enumerate(np.roll(np.arange(len(SIZES)), 5 * run).tolist()):
            drafts.n, drafts.token = (1, 0) if run < 0 else (SIZES[i], (text[turn] + 1) % vocabulary)
            requests = Requests([Request()], [torch.zeros(session.committed[0] + 1, dtype=torch.int64)], [before])
            start = time.perf_counter()
            last = session.round({0: last}, requests)[0][0]
            seen[run, i] = time.perf_counter() - start
            if run < 0:
                text.append(last)
    return np.quantile(seen, 0.25, axis=0)


class _Chain:
    """In the place of drafts: always a chain of ``n`` nodes, of a guess that is wrong at once. Positions end where the model's
    do."""

    seconds = verify_seconds = commit_seconds = 0.0
    n, token = 1, 0

    def __init__(self, program: Program) -> None:
        self._positions, self._vocabulary = program.meta["positions"], program.meta["vocab"]

    def propose(self, last: torch.Tensor, requests: Requests, at: Tokens) -> tuple[torch.Tensor, Tokens]:
        tree = chain(0, np.full(self.n - 1, self.token), np.zeros(self.n - 1, np.int64))
        pos = np.minimum(int(at.pos[0]) + tree.depth, self._positions - 1)
        nodes = [torch.from_numpy(x) for x in (tree.token, np.zeros(self.n, np.int64), pos, tree.parent)]
        return nodes[0], Tokens(nodes[1], nodes[2], 1, nodes[3], torch.from_numpy(tree.ancestors()))

    def feed(self, *round: object) -> None:
        pass

    def grow(self, last: torch.Tensor, requests: Requests, at: Tokens, kind: str | None, *rest: object) -> tuple[object, ...]:
        ids, nodes = self.propose(last, requests, at)
        q, draws = torch.zeros(1, 1).expand(len(ids), self._vocabulary), torch.ones(len(ids), dtype=torch.int64)
        return ids, {"wor": (q,), "iid": (q, draws)}.get(kind or "", ()), nodes

    def learn(self, *round: object) -> None:
        pass


def _path(key: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    machine = f"{platform.node()} {platform.processor()} {os.cpu_count()}"
    return Path(base) / "elision" / f"steps-{hashlib.sha256(f'{machine} {key}'.encode()).hexdigest()[:24]}.json"
