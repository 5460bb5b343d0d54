"""Prompts edited by the program before the model reads them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from elision.ir.interp import Interpreter
from elision.ir.tokens import Tokens
from elision.runtime.text import Tokenizer


@dataclass
class Edited:
    """Prompts after all edits, the places in each of what was left out, and how many seconds that took."""

    prompts: list[list[int]]
    removed: list[list[int]]
    seconds: float = 0.0


def edit(interpreter: Interpreter, prompts: list[list[int]], tokenizer: Tokenizer | None) -> Edited:
    """The prompts as the program's edits leave them."""
    start = time.perf_counter()
    left = [list(range(len(p))) for p in prompts]
    for graph in interpreter.program.edits:
        for row, places in enumerate(left):
            ids = [prompts[row][i] for i in places]
            words = tokenizer.words(ids) if tokenizer is not None else list(range(len(ids)))
            inputs = {"ids": torch.tensor(ids), "words": torch.tensor(words)}
            _, kept = interpreter.run(graph, inputs, {"t": Tokens.chunk([len(ids)], [0])})
            left[row] = [places[i] for i in kept.tolist()]
    removed = [sorted(set(range(len(p))) - set(places)) for p, places in zip(prompts, left, strict=True)]
    edited = [[p[i] for i in places] for p, places in zip(prompts, left, strict=True)]
    return Edited(edited, removed, time.perf_counter() - start)
