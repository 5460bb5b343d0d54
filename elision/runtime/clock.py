"""What a decode step takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch

from elision.ir.interp import Interpreter
from elision.ir.program import Program
from elision.ir.requests import Requests
from elision.ir.verify import Request
from elision.runtime.session import Session

_TURNS, _ROUNDS = 16, 4  # the first round of a turn is not counted: others had the caches before


def decode_seconds(interpreters: Sequence[Interpreter], contexts: Sequence[int]) -> list[list[float]]:
    """Seconds of a round of one sequence, by interpreter and by how many tokens came before it (all of it: what the host does,
    too). They are those of the thread that calls, which waits for no other program, and all take turns, so that what else the
    machine does counts little; how long one takes next to the first is the median over the turns."""
    runs = [_Run(each, context) for each in interpreters for context in contexts]
    with torch.inference_mode():
        seen = np.array([[run.turn() for run in runs] for _ in range(_TURNS)])
    found = np.median(seen[:, 0]) * np.median(seen / seen[:, :1], axis=0)
    return found.reshape(len(interpreters), len(contexts)).tolist()  # type: ignore[no-any-return]


def made_up(program: Program) -> dict[str, torch.Tensor]:
    """Weights of a program to time it with, of the types that it stores: of ordinary size, each in memory of its own."""
    found = {}
    for name, type in program.params.items():
        dims, dtype = type.storage
        found[name] = torch.empty([n for n in dims if isinstance(n, int)], dtype=dtype)
        found[name].view(torch.uint8).fill_(0x3C)  # 0.01 in float32 and bfloat16, 1.06 in float16
    return found


class _Run:
    def __init__(self, interpreter: Interpreter, context: int) -> None:
        self._context, self._last = max(context, 1), 0
        self._session = Session(interpreter, 1, self._context + _TURNS * _ROUNDS)
        self._session.prefill([[0] * self._context])

    def turn(self) -> float:
        """Seconds of a round, the median of a few."""
        seen = []
        for _ in range(_ROUNDS):
            tokens = torch.zeros(self._session.committed[0] + 1, dtype=torch.int64)
            requests = Requests([Request()], [tokens], [self._context])
            start = time.thread_time()
            self._last = self._session.round({0: self._last}, requests)[0][0]
            seen.append(time.thread_time() - start)
        return statistics.median(seen[1:])
