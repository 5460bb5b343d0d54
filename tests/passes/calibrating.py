"""What the tests of the calibrated passes share."""

from __future__ import annotations

import torch

from elision.ir.program import Program
from elision.passes import from_text
from elision.passes.calibration import Calibrated, Text, run_score
from elision.passes.pipeline import transform

Weights = dict[str, torch.Tensor]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(rows: int = 6, length: int = 40, vocab: int = 64) -> torch.Tensor:
    return torch.randint(0, vocab, (rows, length), generator=generator(3))


def logits(program: Program, weights: Weights) -> torch.Tensor:
    return run_score(program, weights, list(ids()))[0]


def transformed(program: Program, weights: Weights, *passes: str) -> tuple[Program, Weights]:
    calibrates = any(isinstance(from_text(text), Calibrated) for text in passes)
    return transform(program, weights, passes, Text(ids() if calibrates else None))


def floats(program: Program, weights: Weights) -> Weights:
    """The numbers of all weights, decoded."""
    types = program.params
    return {n: t.encoding.decode(weights[n], t.row) if (t := types[n]).encoding else weights[n] for n in weights}
