"""A model of six layers without a frontend, quick to compile, and runs of it."""

from __future__ import annotations

import functools

from programs import tiny_llama

import elision
from elision.codegen.cpu.compile import compile_program
from elision.ir.coverage import coverage
from elision.passes.calibration import Text
from elision.passes.pipeline import transform
from tests.passes.calibrating import ids

LAYERS = 6


@functools.cache
def compiled(*passes: str, target: str = "reference", text: bool = False) -> elision.Model:
    """The model with the passes. ``text``: for passes that calibrate."""
    program, weights = tiny_llama(layers=LAYERS, dtype="f32")
    weights["embed"] = weights["embed"] * 0.12  # what is read next is not what was read
    raised = program
    program, weights = transform(program, weights, list(passes), Text(ids() if text else None))
    native, found = compile_program(program) if target == "cpu" else None, coverage(raised, program)
    return elision.Model(program, weights, tokenizer=None, defaults={}, coverage=found, max_context=160, native=native)
