"""What the verbs act on: a model to compile, or an artefact to open."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from elision.errors import BadInput, IllegalProgram
from elision.ir.program import QUALITIES, Program
from elision.runtime.model import Model

#: Progress, statistics and errors; standard output is for results. Text is printed as it is: names may have brackets.
errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def open_model(source: str, passes: Sequence[str] = (), **options: Any) -> Model:
    """Compile a model or open an artefact, and apply the passes. ``options``: those of `elision.compile`, None where not
    given; for an artefact only ``threads`` and ``device`` can be chosen."""
    given = {k: v for k, v in options.items() if v is not None}
    device = given.pop("device", None)
    if not is_artefact(source):
        import elision

        given |= {"target": "cuda"} if device == "cuda" else {}
        return elision.compile(source, passes=list(passes), **given)
    from elision.runtime.artefact import load

    threads = given.pop("threads", None)
    if given:
        settled = ", ".join("--" + name.replace("_", "-") for name in given)
        raise BadInput(f"{source} is taken as an artefact, where {settled} cannot be changed: compile the model again")
    if device == "cuda" and passes:
        raise BadInput(f"{source} has code for GPUs of its program as it is: compile the model with {', '.join(passes)}")
    model = load(source, threads=threads, device=device)
    return with_passes(model, passes) if passes else model


def is_artefact(source: str) -> bool:
    """A file that is not a GGUF file is opened as an artefact (which says what is wrong with it)."""
    path = Path(source)
    return path.suffix == ".elision" or (path.is_file() and path.suffix != ".gguf")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises BadInput for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise BadInput(f"{path} could not be read as text in UTF-8: {getattr(err, 'strerror', None) or err}") from err


def with_passes(model: Model, passes: Sequence[str]) -> Model:
    """The same model with more passes applied to its program."""
    from elision.ir.coverage import left
    from elision.passes.calibration import Text
    from elision.passes.pipeline import transform

    text = Text(encode=model.tokenizer.encode if model.tokenizer else None)
    program, weights = transform(model.program, model.weights, passes, text)
    return Model(
        program,
        weights,
        tokenizer=model.tokenizer,
        defaults=model.defaults,
        coverage={**model.coverage, **left(program)},
        max_context=model.max_context,
        max_batch=model.max_batch,
        threads=model.threads,
    )


def violations(program: Program, passes: Sequence[str]) -> list[IllegalProgram]:
    """Every violation at the first pass that breaks a rule, each naming that pass; none if the passes compose."""
    from elision.ir.verifier import check
    from elision.passes.pipeline import resolve

    done = program.copy()
    for step in resolve(passes):
        step.apply(done)
        done.quality = max(done.quality, step.quality, key=QUALITIES.index)
        if found := check(done):
            by = step.text()
            return [IllegalProgram(v.rule, v.what, sides=f"{by}; {v.sides}", because=v.because, help=v.help) for v in found]
    return []


@contextmanager
def progress() -> Iterator[None]:
    """Shows the stages that the compiler logs, on standard error: the last one with a spinner, on a terminal."""
    log = logging.getLogger("elision")
    with errors.status("starting") as status:

        class Stages(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                errors.print(record.getMessage(), style="dim")
                status.update("compiling")

        handler, level = Stages(logging.INFO), log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            yield
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
