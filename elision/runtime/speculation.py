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
_RUNS, _BEFORE = 3, 64
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
    """Seconds of a round's call over each of `SIZES` nodes after a short prompt, medians; measured once per ``key`` and
    machine."""
    path = _path(key)
    try:
        found = json.loads(path.read_text())
        if len(found) == len(SIZES) and all(isinstance(x, float) and x > 0 for x in found):
            return np.array(found)
    except (OSError, ValueError, TypeError):
        pass
    log.info("measuring what a step of 1 to %d nodes costs", SIZES[-1])
    next, _ = _round(interpreter, 1, 0)
    wrong = (next + 1) % interpreter.program.meta["vocab"]
    seen = np.array([[_round(interpreter, n, wrong)[1] for n in SIZES] for _ in range(_RUNS + 1)])[1:]
    times = np.median(seen, 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(times.tolist()))
    except OSError as err:
        log.info("the times are not kept: %s", err)
    return times


def _round(interpreter: Interpreter, n: int, token: int) -> tuple[int, float]:
    """One round over a chain of n nodes, all of which guess ``token``: the first new token, and the seconds."""
    positions = interpreter.program.meta["positions"]
    before = min(_BEFORE, positions - 1)
    session = Session(interpreter, 1, before + SIZES[-1], _Chain(n, token, interpreter.program))  # type: ignore[arg-type]
    session.prefill([[0] * before])
    requests = Requests([Request()], [torch.zeros(before + 1, dtype=torch.int64)], [before])
    start = time.perf_counter()
    tokens = session.round({0: 0}, requests)
    return tokens[0][0], time.perf_counter() - start


class _Chain:
    """In the place of drafts: always the same chain, of a guess that is wrong at once. Positions end where the model's do."""

    seconds = verify_seconds = commit_seconds = 0.0

    def __init__(self, n: int, token: int, program: Program) -> None:
        self._n, self._token = n, token
        self._positions, self._vocabulary = program.meta["positions"], program.meta["vocab"]

    def propose(self, last: torch.Tensor, requests: Requests, at: Tokens) -> tuple[torch.Tensor, Tokens]:
        tree = chain(0, np.full(self._n - 1, self._token), np.zeros(self._n - 1, np.int64))
        pos = np.minimum(int(at.pos[0]) + tree.depth, self._positions - 1)
        nodes = [torch.from_numpy(x) for x in (tree.token, np.zeros(self._n, np.int64), pos, tree.parent)]
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
    return Path(base) / "elision" / f"step-seconds-{hashlib.sha256(f'{machine} {key}'.encode()).hexdigest()[:24]}.json"
