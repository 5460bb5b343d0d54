"""A module's own forward as a program, compiled once for all graphs that are captured from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from elision.compiler import finish
from elision.dynamo.frame import plain
from elision.dynamo.options import Options
from elision.dynamo.weights import Weights, settings, tensors
from elision.errors import BadInput, ElisionError
from elision.frontend import huggingface
from elision.frontend.capture import capture
from elision.frontend.inputs import ROWS
from elision.frontend.raising import Raised, raise_model
from elision.frontend.source import load_source
from elision.passes import InsertCache
from elision.passes.calibration import Text
from elision.passes.pipeline import run, transform
from elision.runtime.model import Model

log = logging.getLogger("elision")


@dataclass(frozen=True)
class Forward:
    """``model`` with the passes, ``exact`` without (the same, if there are none), of a module that had these ``weights``."""

    model: Model
    exact: Model
    weights: Weights


_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, Forward]] = WeakKeyDictionary()


def compile_forward(module: nn.Module, inputs: Mapping[str, Tensor], options: Options, steps: bool = False) -> Forward:
    """The forward of ``module``, kept for the next graph of it; with ``steps`` its program of generation.

    Raises UnsupportedModel or BadInput for a module that cannot be raised, BadOption for passes that cannot be applied.
    """
    # Graphs of plain modules are made for the inputs that they are given; those of transformers have examples of their own.
    key = (steps, options.key, settings(module), () if huggingface.recognises(module) else tuple(inputs))
    known = _KNOWN.setdefault(module, {})
    if key not in known or not known[key].weights.same(tensors(module)):
        known[key] = _compile(module, inputs, options, steps)
    return known[key]


def compile_steps(module: nn.Module, inputs: Mapping[str, Tensor], options: Options) -> Forward:
    """The program of generation of ``module``. Raises BadOption for passes that change what a cache holds, or when."""
    wrong = [p.text() for p in options.passes if p.family != "weights"]
    if wrong:
        raise BadOption(
            f"{', '.join(wrong)}: on the caller's cache only weight formats apply; use elision.compile(model, "
            f"passes={[p.text() for p in options.passes]}) and its generate"
        )
    return compile_forward(module, inputs, options, steps=True)


class BadOption(ElisionError):
    """The options do not fit the model: said to the caller, where a model that cannot be raised just runs as it is."""


def _compile(module: nn.Module, inputs: Mapping[str, Tensor], options: Options, steps: bool) -> Forward:
    source = load_source(plain(module))
    ids = len(inputs) == 1 and not any(x.is_floating_point() for x in inputs.values())
    example = None if huggingface.recognises(module) or ids else {name: _rows(x) for name, x in inputs.items()}
    raised = raise_model(capture(source.model, example=example), source.name, positions=source.positions)
    facts: dict[str, Any] = {
        "tokenizer": None,
        "defaults": {},
        "max_context": raised.program.meta["positions"],
        "threads": options.threads or torch.get_num_threads(),
    }
    cached: list[Any] = [InsertCache()] if steps else []
    try:
        program, weights = transform(raised.program, raised.weights, [*cached, *options.passes], Text(options.calibration))
        if not steps and set(program.entries) != {"score"}:
            raise BadInput("they add entries to the program of a forward")
    except BadInput as err:
        raise BadOption(_refusal(raised, options, err)) from err
    model = exact = finish(raised.program, program, weights, options.target, **facts)
    if options.passes:
        plain_program, plain_weights = transform(raised.program, raised.weights, cached, Text())
        exact = finish(raised.program, plain_program, plain_weights, "reference", **facts)
    return Forward(model, exact, Weights(tensors(module)))


def _rows(x: Tensor) -> Tensor:
    """The input with as many rows as examples have: torch.export takes a single row for the only number that there may be."""
    return x[:1].repeat(ROWS, *[1] * (x.dim() - 1)) if x.dim() and len(x) == 1 else x


def _refusal(raised: Raised, options: Options, err: BadInput) -> str:
    """What the caller is told about passes: whether they would act in the program of generation."""
    texts = [p.text() for p in options.passes]
    caches = any(isinstance(p, InsertCache) for p in options.passes)
    try:
        run(raised.program, options.passes if caches else [InsertCache(), *options.passes])
    except ElisionError:
        return str(err)
    return (
        f"{', '.join(texts)}: one of them changes how tokens are generated, and torch.compile sees a forward only ({err}); "
        f"use elision.compile(model, passes={texts}) and its generate"
    )
