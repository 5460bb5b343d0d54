"""What storing weights in fewer bits does to a model: perplexity on text that no pass was calibrated on.

python benchmarks/perplexity.py [--model smollm2] [--tokens 4096] [--pass "gptq:group=64 int4:group=64" ...] [--output FILE]

The text is every second topic of Python's documentation (`pydoc_data.topics`), in sequences of 512 tokens spread evenly over it;
passes calibrate on the other topics. Each row is one program on native code for the CPU. Bits count the blocks' matrices
(with scales and minima), bytes all distinct weights.
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from output import give
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch.nn.functional import cross_entropy

import elision
from elision.codegen.cpu.compile import compile_program
from elision.passes.calibration import Text, topics
from elision.passes.pipeline import transform
from elision.runtime.report import weight_bytes

#: gptq that calibrates on nothing to speak of makes nothing good: plain rounding of the same weights, to compare with.
PLAIN = "gptq:group={0},damp=1e9,tokens=1"
#: Passes of a row, separated by spaces. int8 and int4 at the end take what the calibrated passes leave: embedding and head.
ROWS = (
    "",
    "bf16",
    "int8",
    "int8 a8",
    "int4",
    "int4 a8",
    "gptq int8",
    "gptq int8 a8",
    "smoothquant-plus int8",
    "int4:group=64",
    "gptq:group=64 int4:group=64",
    *(f"{row.format(group)} int8" for group in (64, 96, 192) for row in (PLAIN, "gptq:group={0}", "smoothquant-plus:group={0}")),
    "gptq:bits=8,group=192 int8",
)


def perplexity(model: elision.Model, sequences: Sequence[torch.Tensor]) -> float:
    """How surprised the model is by each token, given those before it in its sequence."""
    loss = sum(cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="sum").item() for ids in sequences)
    return math.exp(loss / sum(len(ids) - 1 for ids in sequences))


def bits(model: elision.Model) -> float:
    """Bits for a weight of the blocks' matrices."""
    matrices = [t for n, t in model.program.params.items() if len(t.axes) > 1 and ".layers." in n]
    stored = sum(math.prod(t.storage[0]) * t.storage[1].itemsize for t in matrices)
    return 8 * stored / sum(math.prod(t.axes) for t in matrices)


def with_passes(base: elision.Model, passes: Sequence[str]) -> tuple[elision.Model, float]:
    """The model with the passes, on native code; and how many seconds these took."""
    assert base.tokenizer is not None
    start = time.perf_counter()
    program, weights = transform(base.program, base.weights, passes, Text(encode=base.tokenizer.encode))
    took = time.perf_counter() - start
    model = elision.Model(
        program,
        weights,
        tokenizer=base.tokenizer,
        defaults=base.defaults,
        coverage=base.coverage,
        max_context=base.max_context,
        threads=base.threads,
        native=compile_program(program),
    )
    return model, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="a packaged name, a GGUF file or a Hugging Face directory")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text that is measured on (default: %(default)s)")
    parser.add_argument("--pass", action="append", dest="rows", metavar="PASSES", help="a row: passes, separated by spaces")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the markdown table goes (default: standard output)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    console = Console(stderr=True, soft_wrap=True)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("elision").setLevel(logging.INFO)  # what the passes chose
    base = elision.compile(args.model, target="reference", threads=args.threads)
    assert base.tokenizer is not None
    sequences = Text([topics(1)], base.tokenizer.encode).sequences(base.program, args.tokens)
    lines = ["| passes | perplexity | bits per weight of blocks | all weights, MB | seconds of passes |", "|---|---|---|---|---|"]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        rows = args.rows or ROWS
        task = progress.add_task("", total=len(rows))
        for row in rows:
            progress.update(task, description=row or "as it is")
            model, took = with_passes(base, row.split())
            name = " ".join(f"`{text}`" for text in row.split()) or "as it is"
            found = perplexity(model, sequences)
            lines.append(f"| {name} | {found:.3f} | {bits(model):.2f} | {weight_bytes(model) / 1e6:.1f} | {took:.0f} |")
            console.print(lines[-1])
            progress.advance(task)
    head = f"{args.model}, {sum(map(len, sequences))} tokens in sequences of {len(sequences[0])}; torch {torch.__version__}, "
    text = head + f"Python {platform.python_version()}\n\n" + "\n".join(lines) + "\n"
    give(text, args.output)


if __name__ == "__main__":
    main()
