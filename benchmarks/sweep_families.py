"""Every causal-LM configuration of the installed transformers, made tiny, compiled and compared: right, told or wrong.

    python benchmarks/sweep_families.py [--only llama gemma3_text ...] [--table FILE]

Each family runs in a process of its own with limits of CPU time and memory. Its row says one of

    right      raised; the outputs, and at least 16 greedy tokens through the cache, equal those of transformers without a cache
               (in float32; where that differs by more than 1e-5 of the largest logit, in float64, where the
               model's casts to float32 are widened too, and the row says so)
    told       refused with a sentence that says what is in the way
    not made   transformers' own model cannot be made tiny or does not run
    late       not done within the limits
    fault      refused, but because of an error that nobody foresaw: a bug
    WRONG      raised, but something differs: a bug
    crash      an exception that is not ours: a bug

The table is written after every family; with --only, the rows of the others stay as they are.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "raise")]
TABLE = ROOT / "benchmarks" / "results" / "2026-11-21-sweep.md"
#: Imported once, before the processes of the families are forked off.
PRELOAD = ["torch.export", "torch._dynamo", "transformers.models.llama.modeling_llama", "elision.compiler",
    "elision.frontend.raising", "elision.frontend.source", "elision.passes.pipeline", "elision.runtime.model"]  # fmt: skip
OUTCOMES = ("right", "told", "not made", "late", "fault", "WRONG", "crash")
MOST_PARAMETERS = 20_000_000


def outcome(family: str) -> tuple[str, str]:
    """What becomes of the family, and a sentence on it."""
    import torch
    import transformers
    from right import shaken
    from tiny_configs import tiny
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import elision
    from elision.frontend import huggingface
    from elision.frontend.check import FAULT

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    try:
        config = tiny(CONFIG_MAPPING[family])
        with torch.device("meta"):
            size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return "not made", f"{size / 1e6:.0f} M parameters are left"
        model: Any = shaken(transformers.AutoModelForCausalLM.from_config(config))
        with torch.no_grad():
            logits = model(torch.arange(3, 43)[None]).logits
        if not bool(logits.isfinite().all()):
            return "not made", "its logits are not finite"
    except Exception as error:  # whatever transformers raises
        return "not made", _sentence(error)
    try:
        compiled = elision.compile(model)
    except elision.ElisionError as error:
        return "fault" if FAULT in str(error) else "told", _sentence(error, named=False)
    except Exception as error:
        return "crash", _sentence(error)
    opaque = ", ".join(f"{name} ({count})" for name, count in compiled.coverage["opaque"].items())
    remarks = [f"opaque: {opaque}"] if opaque else []
    try:
        try:
            found = _compared(model, compiled)
        except AssertionError as error:  # a fault stays one in float64, rounding does not
            remarks.append(f"in float32 {_sentence(error, named=False)}, so compared in float64")
            wide = elision.compile(model, dtype="float64")
            with huggingface.plain_experts(model), wide_casts():  # torch's grouped product has no float64
                found = _compared(model.double(), wide)
        return "right", "; ".join([*remarks, *found])
    except AssertionError as error:
        return "WRONG", "; ".join([*remarks, _sentence(error, named=False)])
    except Exception as error:
        return "crash", "after compiling: " + _sentence(error)


@contextmanager
def wide_casts() -> Iterator[None]:
    """Inside, models that cast to float32 (norms, rotations, softmax) get float64."""
    import torch

    single, cast = torch.float32, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = cast  # type: ignore[method-assign]


def _compared(model: Any, compiled: Any) -> list[str]:
    """Remarks on outputs and tokens. Raises AssertionError where they are not those of the model."""
    from right import VARIED, assert_right, assert_same_tokens
    from tiny_configs import VOCABULARY

    assert_right(model, compiled, VOCABULARY)
    if "step" not in compiled.program.entries:
        return ["its attention is not causal, so it has no decoder"]
    distinct = assert_same_tokens(model, compiled, VOCABULARY)
    return [f"{distinct} different tokens"] if distinct < VARIED else []


def _sentence(error: Exception, named: bool = True) -> str:
    text = " ".join(str(error).split())
    if len(text) > 400:
        text = text[:400] + " ..."
    return f"{type(error).__name__}: {text}" if named else text


def _child(family: str, seconds: int, memory: int, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    import torch

    torch.set_num_threads(1)
    answer.send(outcome(family))


def limited(family: str, seconds: int, memory: int) -> tuple[str, str]:
    """The outcome, from a process of its own with at most so many seconds of CPU time and so many bytes."""
    context = multiprocessing.get_context("forkserver")  # which imports everything once
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, seconds, memory, there), daemon=True)
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(10 * seconds) else ("late", f"not done after {10 * seconds} s")
    except EOFError:
        process.join()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "late", f"not done after {seconds} s of CPU time"
        return "crash", f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()


def read_table(path: Path) -> dict[str, tuple[str, str]]:
    """The rows of a table that was kept."""
    if not path.exists():
        return {}
    lines = [line.strip().strip("|").split("|", 2) for line in path.read_text().splitlines() if line.startswith("|")]
    return {name.strip(): (kind.strip(), text.strip()) for name, kind, text in lines if kind.strip() in OUTCOMES}


def table(rows: dict[str, tuple[str, str]], version: str) -> str:
    """The table as Markdown, with the counts above it."""
    counts = Counter(kind for kind, _ in rows.values())
    head = ", ".join(f"{counts[kind]} {kind}" for kind in OUTCOMES)
    lines = [f"| {name} | {kind} | {text.replace('|', '/')} |" for name, (kind, text) in sorted(rows.items())]
    return "\n".join(
        [
            "# Every causal-LM family, tiny: right or told",
            "",
            f"Made by `python benchmarks/sweep_families.py`, which says what the words mean, with transformers {version}:",
            f"{len(rows)} families, {head}.",
            "",
            "| family | outcome | remark |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="just these; the other rows of the table stay")
    parser.add_argument("--table", type=Path, default=TABLE, help="the file that holds the table")
    parser.add_argument("--seconds", type=int, default=120, help="the most CPU time of one family")
    parser.add_argument("--gigabytes", type=float, default=12, help="the most address space of one family")
    given = parser.parse_args()

    import transformers
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    families = given.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if unknown := set(families) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        parser.error(f"no causal-LM families of transformers: {', '.join(sorted(unknown))}")
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    rows = read_table(given.table) if given.only else {}
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(families))
        for family in families:
            progress.update(task, description=family)
            began = time.monotonic()
            rows[family] = kind, text = limited(family, given.seconds, int(given.gigabytes * 2**30))
            progress.console.print(f"{family:24} {kind:8} {time.monotonic() - began:4.0f} s  {text[:150]}", markup=False)
            given.table.write_text(table(rows, transformers.__version__))
            progress.advance(task)
    return int(any(rows[f][0] in ("fault", "WRONG", "crash") for f in families))


if __name__ == "__main__":
    raise SystemExit(main())
