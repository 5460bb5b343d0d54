"""A linear function of the stream that says whether a token may leave: fitted on what the whole model says."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from elision.ir.interp import Interpreter
from elision.ir.program import Program, Weights
from elision.ir.tokens import Tokens
from elision.ir.types import Tensor
from elision.ir.value import Value
from elision.passes.calibration import run_score
from elision.passes.layers.parts import cut, stream_after, stream_before

log = logging.getLogger("elision")
_STEPS, _DECAY = 20, 1e-3


def parameters(width: int) -> dict[str, Tensor]:
    """The types of its weights for a stream of that width."""
    return {"calm.weight": Tensor((width,), "f32"), "calm.bias": Tensor((), "f32")}


def fit(program: Program, weights: Weights, exits: Sequence[int], sequences: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of one function for all exits (CALM, section 3.5): the probability that the likeliest token of the stream there is
    that of the whole model. The backbone stays as it is; the streams of the text are computed once."""
    score = program.entries["score"]
    wanted = {stream_before(score, layer): layer for layer in exits}
    first = {next(v for v in score.calls() if v.args[0] is h): layer for h, layer in wanted.items()}
    head = cut(program, score, "head", stream_after(score), (score.outputs[0],), (), "calm")
    axis = head.inputs[0].tensor.tokens
    assert axis is not None
    streams: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for n, ids in enumerate(sequences, 1):
        found: list[torch.Tensor] = []

        def observe(value: Value, operands: Sequence[Any], found: list[torch.Tensor] = found) -> None:
            if value in first:
                found.append(operands[0])

        said = run_score(program, weights, [ids], observe)[0].argmax(-1)
        at, interpreter = Tokens.chunk([len(ids)], [0]), Interpreter(program, weights)
        for h in found:
            with torch.inference_mode():
                here = interpreter.run(head, {head.names[head.inputs[0]]: h}, {axis.name: at})[0].argmax(-1)
            streams.append(h.float())
            labels.append((here == said).float())
        log.info("calm: streams of %d of %d sequences", n, len(sequences))
    w, b = logistic(torch.cat(streams), torch.cat(labels))
    return {"calm.weight": w, "calm.bias": b}


def logistic(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression of ``y [n]`` (0 or 1) on ``x [n, d]`` by Newton steps, with channels of unit variance and a ridge:
    weights ``[d]`` and a bias ``[]``."""
    x, y = x.double(), y.double()
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    wide = torch.cat(((x - mean) / scale, torch.ones(len(x), 1, dtype=x.dtype)), 1)
    w = torch.zeros(wide.shape[1], dtype=x.dtype)
    ridge = _DECAY * torch.eye(len(w), dtype=x.dtype)
    for _ in range(_STEPS):
        p = torch.sigmoid(wide @ w)
        gradient = wide.T @ (p - y) / len(y) + _DECAY * w
        curvature = (wide * (p * (1 - p))[:, None]).T @ wide / len(y) + ridge
        step = torch.linalg.solve(curvature, gradient)
        w = w - step * min(1.0, 4.0 / float(step.norm().clamp(min=1e-12)))
        if float(step.norm()) < 1e-6:
            break
    weight = w[:-1] / scale
    return weight.float(), (w[-1] - weight @ mean).float()
