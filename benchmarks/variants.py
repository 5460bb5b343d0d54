"""SmolLM2 with several methods on its caches, raised once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import elision
from elision.codegen.cpu.compile import compile_program
from elision.passes.calibration import Text
from elision.passes.pipeline import transform


def variants(weights: list[str], passes: Iterable[list[str]], threads: int) -> Iterator[elision.Model]:
    """The model with the passes ``weights`` and a cache in bf16, then with each of ``passes`` besides."""
    base = elision.compile("smollm2", passes=weights, kv_dtype="bf16", target="reference", threads=threads)
    assert base.tokenizer is not None
    for more in passes:
        program, tensors = transform(base.program, base.weights, more, Text(encode=base.tokenizer.encode))
        yield elision.Model(
            program, tensors, tokenizer=base.tokenizer, defaults=base.defaults, coverage=base.coverage,
            max_context=base.max_context, threads=threads, native=compile_program(program),
        )  # fmt: skip
