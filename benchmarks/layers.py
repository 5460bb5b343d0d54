"""What leaving layers out costs and saves: perplexity on text that no pass was calibrated on, and with --times tokens per second.

python benchmarks/layers.py [--share 0.1 ...] [--search 0.25] [--rows FILE.jsonl] [--times] [--output FILE.md] [--plot FILE.svg]

Each row is SmolLM2-135M-Instruct with some of its 30 layers left out, with the weights as they are in its file. Random layers are
``--draws`` draws, shown by their median. ``skipdecode`` leaves out its share on average over 512 positions. Passes calibrate on
every second topic of Python's documentation, the perplexity is of the others. ``--search``: the shares that evopress searches
(minutes each). ``--rows`` keeps what was measured, so that a run that is interrupted goes on where it was. ``--times``, for an
idle machine: the fastest of 75 native steps (one sequence, 64 positions); the ideal is the ratio of the bytes of weights read.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median

import torch
from chart import chart
from peers import step_seconds
from perplexity import perplexity
from rich.console import Console

import elision
from elision.passes.calibration import Text, topics
from elision.passes.layers.depth import evenly
from elision.passes.layers.skip_layers import SkipLayers
from elision.runtime.report import weight_bytes

LAYERS = 30
METHODS = ("as it is", "random", "unified-skip", "shortgpt", "evopress", "skipdecode")


@dataclass(frozen=True)
class Row:
    """One program: the method, the share of layers left out, and what was measured (seconds: of a step; 0: not measured)."""

    method: str
    share: float
    asked: str
    text: str
    perplexity: float
    seconds: float
    bytes: int


def methods(shares: Sequence[float], searched: Sequence[float], draws: int) -> list[tuple[str, float, str]]:
    """Method, share of the layers that it leaves out, and pass."""
    found = [("as it is", 0.0, "")]
    for share in shares:
        count = int(share * LAYERS + 1e-9)
        for draw in range(draws):
            found.append(("random", count / LAYERS, skipping(Random(1000 * draw + count).sample(range(LAYERS), count))))
        spread = set(evenly(LAYERS, LAYERS - count))
        found.append(("unified-skip", count / LAYERS, skipping(i for i in range(LAYERS) if i not in spread)))
        found.append(("shortgpt", count / LAYERS, f"shortgpt:share={share}"))
        if 2 * count <= LAYERS - 2:
            found.append(("skipdecode", count / LAYERS, f"skipdecode:length=512,stages=16,most=30,least={LAYERS - 2 * count}"))
    found += [("evopress", int(s * LAYERS + 1e-9) / LAYERS, f"evopress:share={s}") for s in searched]
    return found


def skipping(layers: Iterable[int]) -> str:
    return SkipLayers(tuple(sorted(layers))).text()


def measure(method: str, share: float, text: str, sequences: Sequence[torch.Tensor], times: bool, threads: int) -> Row:
    passes = [*([text] if text else []), "stored"]
    model = elision.compile("smollm2", passes=passes, threads=threads, target="cpu" if times else "reference")
    step = min(step_seconds(model, 64, 1, 75)) if times else 0.0
    told = next((t for t in model.report["passes"] if text and t.startswith(text.partition(":")[0])), "")
    return Row(method, share, text, told, perplexity(model, sequences), step, weight_bytes(model))


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown; the draws of random layers are one line."""
    full, times = rows[0], all(r.seconds for r in rows)
    lines = ["| left out | method | perplexity |" + (" tokens/s | speed-up | of the ideal |" if times else "") + " pass |"]
    lines.append("|---" * lines[0].count(" |") + "|")
    for (share, method), group in grouped(rows).items():
        found = [r.perplexity for r in group]
        shown = f"{median(found):.4g}" + (f" ({min(found):.4g} to {max(found):.4g})" if len(group) > 1 else "")
        fast = min(group, key=lambda r: r.seconds)
        faster, ideal = full.seconds / (fast.seconds or 1), full.bytes / fast.bytes
        timed = f" {1 / fast.seconds:.0f} | {faster:.2f} | {faster / ideal:.2f} |" if times else ""
        name = f"`{group[0].text}`" if group[0].text and len(group) == 1 else ""
        lines.append(f"| {share:.0%} | {method} | {shown} |{timed} {name} |")
    return lines


def grouped(rows: Sequence[Row]) -> dict[tuple[float, str], list[Row]]:
    """By share and method, in that order."""
    keys = sorted({(r.share, METHODS.index(r.method)) for r in rows})
    return {(share, METHODS[i]): [r for r in rows if (r.share, r.method) == (share, METHODS[i])] for share, i in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="of the text that is measured on (default: %(default)s)")
    parser.add_argument("--share", type=float, nargs="*", default=[0.1, 0.2, 0.25, 0.3, 0.4, 0.5])
    parser.add_argument("--search", type=float, nargs="*", default=[0.1, 0.25, 0.4, 0.5])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--rows", type=Path, help="where rows are kept, one line of JSON each")
    parser.add_argument("--output", type=Path, help="where the markdown table goes (default: standard output)")
    parser.add_argument("--plot", type=Path, help="where the plot goes")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    console = Console(stderr=True, soft_wrap=True)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("elision").setLevel(logging.INFO)
    base = elision.compile("smollm2", target="reference", threads=args.threads)
    assert base.tokenizer is not None
    sequences = Text([topics(1)], base.tokenizer.encode).sequences(base.program, args.tokens)
    del base
    wanted, rows = methods(args.share, args.search, args.draws), list[Row]()
    lines = args.rows.read_text().splitlines() if args.rows and args.rows.exists() else []
    kept = {(row.method, row.share, row.asked): row for row in (Row(**json.loads(line)) for line in lines)}
    for i, (method, share, text) in enumerate(wanted, 1):
        row = kept.get((method, share, text)) or measure(method, share, text, sequences, args.times, args.threads)
        rows.append(row)
        console.print(f"{i} of {len(wanted)}: {row}")
        if args.rows and (method, share, text) not in kept:
            with args.rows.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    head = f"smollm2, {sum(map(len, sequences))} tokens in sequences of {len(sequences[0])}, {args.threads} threads; "
    text = head + f"torch {torch.__version__}, Python {platform.python_version()}\n\n" + "\n".join(table(rows)) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    if args.plot:
        found: dict[str, dict[float, float]] = {}
        for (share, method), group in grouped(rows).items():
            if method != METHODS[0]:
                found.setdefault(method, {0.0: rows[0].perplexity})[100 * share] = median(r.perplexity for r in group)
        args.plot.write_text(chart("Layers left out, %", "Perplexity", found), encoding="utf-8")


if __name__ == "__main__":
    main()
