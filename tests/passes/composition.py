"""What the methods on caches compose with, found by compiling and running every pair on a tiny model. `python
tests/passes/composition.py` writes the tables that are kept in elision/passes/COMPOSITION.md; `test_composition.py` compares
them."""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "raise")]

import torch  # noqa: E402
from gguf_files import write_model  # noqa: E402

import elision  # noqa: E402
from elision.codegen.cpu.compile import compile_program  # noqa: E402
from elision.errors import BadInput, IllegalProgram  # noqa: E402
from elision.frontend.capture import capture  # noqa: E402
from elision.frontend.raising import raise_model  # noqa: E402
from elision.frontend.source import load_source  # noqa: E402
from elision.frontend.stored import Stored, blocks_of  # noqa: E402
from elision.ir.program import Program  # noqa: E402
from elision.ir.weights import Blocks  # noqa: E402
from elision.passes.cache import InsertCache  # noqa: E402
from elision.passes.calibration import Text  # noqa: E402
from elision.passes.pipeline import resolve, transform  # noqa: E402
from tests.passes.kv_methods import METHODS, drafted, tokens  # noqa: E402
from tests.passes.small import ROOM, tiny  # noqa: E402

KEPT = ROOT / "elision" / "passes" / "COMPOSITION.md"
AGAIN = "python tests/passes/composition.py"
ROWS = {name: tight for name, (tight, _) in METHODS.items()} | {"h2o:every=1": "h2o:budget=24,recent=8,every=1"}
DRAFTS = {"token-recycling": "token-recycling:nodes=20", "pain-trie": "pain-trie:nodes=20"}
OTHERS: dict[str, tuple[str, ...]] = {name: (text,) for name, text in DRAFTS.items()} | {
    "skip-layers": ("skip-layers:layers=1",),
    "bf16": ("bf16",),
    "int8": ("int8",),
    "int4": ("int4",),
    "int8 a8": ("int8", "a8"),
    "stored": ("stored",),
}
NEW = 30  # tokens after prompts of 50: every clock ticks
ALONE, ALSO = "same tokens", "yes"


@functools.cache
def raised() -> tuple[Program, dict[str, torch.Tensor], dict[str, Stored]]:
    """The tiny model, from a file with Q8_0 blocks, so that `stored` has something to keep: its program, weights and blocks."""
    with tempfile.TemporaryDirectory() as folder:
        model = tiny(num_hidden_layers=3, initializer_range=0.12, intermediate_size=64)
        write_model(Path(folder) / "tiny.gguf", "llama", model, formats=lambda name: "F32" if "norm" in name else "Q8_0")
        source = load_source(Path(folder) / "tiny.gguf")
        found = raise_model(capture(source.model), source.name, positions=source.positions)
        stored = blocks_of(found.weights, source.model, source.stored)
    found.program.stored = {name: Blocks(blocks.format) for name, blocks in stored.items()}
    return found.program, found.weights, stored


@functools.cache
def compiled(passes: tuple[str, ...], target: str) -> elision.Model:
    """As `elision.compile` does, but the model is raised once for all cells."""
    program, weights, stored = raised()
    program, weights = transform(program, weights, [InsertCache(), *resolve(passes)], Text(), stored)
    native = compile_program(program) if target == "cpu" else None
    more: dict[str, Any] = {"tokenizer": None, "defaults": {}, "coverage": {}}
    return elision.Model(program, weights, max_context=ROOM, native=native, threads=1, **more)


@functools.cache
def plain(passes: tuple[str, ...], target: str) -> torch.Tensor:
    return tokens(compiled(passes, target), NEW)


def cell(row: str, other: str) -> str:
    """Whether a method composes with another pass: drafts must give the tokens of the method alone, anything else natively those
    of the interpreter with the passes in the other order. Fails where neither that holds nor the compiler refuses."""
    passes = (ROWS[row], *OTHERS[other])
    try:
        model = compiled(passes, "cpu")
    except (BadInput, IllegalProgram) as error:
        return refused(error, passes)
    if other in DRAFTS:
        assert torch.equal(drafted(model, NEW), plain((ROWS[row],), "cpu")), f"{row} changes with {other}"
        assert model.stats is not None and model.stats.accepted > 4, f"{other} drafts nothing with {row}"
        return ALONE
    assert torch.equal(tokens(model, NEW), plain((*OTHERS[other], ROWS[row]), "reference")), f"{row} is not itself with {other}"
    return ALSO


def refused(error: BadInput | IllegalProgram, passes: tuple[str, ...]) -> str:
    """The rule, or nothing for what a pass itself says."""
    if isinstance(error, IllegalProgram):
        return f"refused: {error.rule}"
    assert str(error).startswith(tuple(text.partition(":")[0] for text in passes)), error
    return "refused"


def pair(first: str, second: str) -> str:
    """Whether two methods compose, the first one applied first."""
    passes = (ROWS[first], ROWS[second])
    try:
        model = compiled(passes, "reference")
    except (BadInput, IllegalProgram) as error:
        return refused(error, passes)
    assert torch.equal(tokens(compiled(passes, "cpu"), NEW), tokens(model, NEW)), passes
    return ALSO


def line(row: str) -> tuple[str, ...]:
    return (f"`{row}`", *(cell(row, other) for other in OTHERS))


def pairs(first: str) -> tuple[str, ...]:
    return (f"`{first}`", *(pair(first, second) for second in METHODS))


def read() -> dict[str, dict[str, tuple[str, ...]]]:
    """The tables that are kept: by the heading of the first column the rows by name, the other headings under ""."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    table: dict[str, tuple[str, ...]] = {}
    for text in KEPT.read_text(encoding="utf-8").splitlines():
        if not text.startswith("| ") or text.startswith("| ---"):
            continue
        name, *cells = (cell.strip().strip("`") for cell in text.strip().strip("|").split("|"))
        if name in ("method", "first, then"):
            found[name] = table = {"": tuple(cells)}
        else:
            table[name] = tuple(cells)
    return found


def text(lines: Iterable[Sequence[str]], both: Iterable[Sequence[str]]) -> str:
    def table(*rows: Sequence[str]) -> list[str]:
        return [f"| {' | '.join(cells)} |" for cells in (rows[0], ("---",) * len(rows[0]), *rows[1:])]

    head = [
        "# What methods on caches compose with",
        "",
        f"Found by compiling and running every pair on a tiny model: `{AGAIN}`; tests compare all of it.",
        f"*{ALONE}*: native decoding with drafts gives the tokens of the method without them. *{ALSO}*: native decoding gives",
        "the tokens of the interpreter with the passes in the other order. *refused*: the compiler says why, with the rule "
        "where one speaks.",
        "`gptq` and `smoothquant-plus` store weights as `int4` and `int8` do.",
        "",
        *table(("method", *(f"`{name}`" for name in OTHERS)), *lines),
        "",
        "Two methods, in the order in which they are given:",
        "",
        *table(("first, then", *(f"`{name}`" for name in METHODS)), *both),
    ]
    return "\n".join([*head, ""])


def main() -> None:
    from rich.progress import track

    lines: list[Any] = [line(row) for row in track(ROWS, "with other passes")]
    KEPT.write_text(text(lines, [pairs(first) for first in track(METHODS, "with each other")]), encoding="utf-8")
    print(KEPT)


if __name__ == "__main__":
    main()
