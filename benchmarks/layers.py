"""What leaving layers out costs and saves: perplexity on text that no pass was calibrated on, and tokens per second.

python benchmarks/layers.py [--tokens 2048] [--share 0.1 0.2 ...] [--pass evopress:share=0.25] [--output FILE] [--plot FILE.svg]

Each row is SmolLM2-135M-Instruct with some of its 30 layers left out, on native code for the CPU with the weights as they are in
its file. Random layers are the mean of ``--draws`` draws. Passes calibrate on every second topic of Python's documentation, the
perplexity is of the others. A step is the fastest of 40 (one sequence, 64 positions), so that other load does not count;
the ideal is the ratio of the bytes of weights that a step reads.
"""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from chart import chart
from peers import step_seconds
from perplexity import perplexity
from rich.console import Console

import elision
from elision.passes.base import from_text
from elision.passes.calibration import Text, topics
from elision.runtime.report import weight_bytes

LAYERS = 30


@dataclass(frozen=True)
class Row:
    """One program: the method, the share of layers left out, and what was measured."""

    method: str
    share: float
    text: str
    perplexity: float
    seconds: float
    bytes: int


def methods(shares: Sequence[float], draws: int) -> list[tuple[str, float, str]]:
    """Method, share of the layers that it leaves out, and pass."""
    found = [("as it is", 0.0, "")]
    for share in shares:
        count = int(share * LAYERS + 1e-9)
        for draw in range(draws):
            chosen = sorted(Random(1000 * draw + count).sample(range(LAYERS), count))
            found.append(("random", count / LAYERS, "skip-layers:layers=" + "+".join(map(str, chosen))))
        found.append(("unified-skip", count / LAYERS, f"unified-skip:speedup={LAYERS / (LAYERS - count):.6f}"))
        found.append(("shortgpt", count / LAYERS, f"shortgpt:share={share}"))
    return found


def measure(method: str, share: float, text: str, sequences: Sequence[torch.Tensor], threads: int) -> Row:
    model = elision.compile("smollm2", passes=[*([text] if text else []), "stored"], threads=threads)
    step = min(step_seconds(model, 64, 1, 40))
    told = next((t for t in model.report["passes"] if text and t.startswith(text.partition(":")[0])), "")
    return Row(method, share, told, perplexity(model, sequences), step, weight_bytes(model))


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown; the draws of random layers are one line."""
    full = rows[0]
    lines = ["| left out | method | perplexity | tokens/s | speed-up | of the ideal | pass |", "|---|---|---|---|---|---|---|"]
    for method, share in dict.fromkeys((r.method, r.share) for r in rows):
        group = [r for r in rows if (r.method, r.share) == (method, share)]
        found = [r.perplexity for r in group]
        shown = f"{found[0]:.1f}" if len(group) == 1 else f"{sum(found) / len(found):.1f} ({min(found):.1f} to {max(found):.1f})"
        seconds = min(r.seconds for r in group)
        faster, ideal = full.seconds / seconds, full.bytes / group[0].bytes
        name = f"`{group[0].text}`" if group[0].text and len(group) == 1 else ""
        lines.append(
            f"| {share:.0%} | {method} | {shown} | {1 / seconds:.0f} | {faster:.2f} | {faster / ideal:.2f} | {name} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of the text that is measured on (default: %(default)s)")
    parser.add_argument("--share", type=float, nargs="*", default=[0.1, 0.2, 0.25, 0.3, 0.4, 0.5])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--pass", action="append", default=[], dest="more", metavar="PASS", help="a further row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the markdown table goes (default: standard output)")
    parser.add_argument("--plot", type=Path, help="where the plot goes")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    console = Console(stderr=True, soft_wrap=True)
    logging.basicConfig(format="%(message)s")
    base = elision.compile("smollm2", target="reference", threads=args.threads)
    assert base.tokenizer is not None
    sequences = Text([topics(1)], base.tokenizer.encode).sequences(base.program, args.tokens)
    del base
    wanted = methods(args.share, args.draws)
    for text in args.more:
        step = from_text(text)
        wanted.append((step.name, int(getattr(step, "share", 0.0) * LAYERS + 1e-9) / LAYERS, text))
    rows = []
    for i, (method, share, text) in enumerate(wanted, 1):
        rows.append(measure(method, share, text, sequences, args.threads))
        console.print(f"{i} of {len(wanted)}: {rows[-1]}")
    head = f"smollm2, {sum(map(len, sequences))} tokens in sequences of {len(sequences[0])}, {args.threads} threads; "
    text = head + f"torch {torch.__version__}, Python {platform.python_version()}\n\n" + "\n".join(table(rows)) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    if args.plot:
        lines: dict[str, dict[float, float]] = {}
        for method, share in dict.fromkeys((r.method, r.share) for r in rows[1:]):
            found = [r.perplexity for r in rows if (r.method, r.share) == (method, share)]
            lines.setdefault(method, {0.0: rows[0].perplexity})[100 * share] = sum(found) / len(found)
        args.plot.write_text(chart("Layers left out, %", "Perplexity", lines), encoding="utf-8")


if __name__ == "__main__":
    main()
