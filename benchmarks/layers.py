"""What leaving out layers costs and saves: perplexity and greedy agreement on text that no pass saw, tokens per second.

python benchmarks/layers.py [--share 0.1 ...] [--search 0.25] [--pass PASS ...] [--rows FILE.jsonl] [--output FILE] [--plot FILE]

Each row is SmolLM2-135M-Instruct with some of its 30 layers left out. Random layers are ``--draws`` draws, shown by their median.
``skipdecode`` leaves out its share on average over 512 positions. Passes calibrate on every second topic of Python's
documentation; the others are read by the model's own forward (reference, float32): how surprised it is, and how often its
likeliest token is that of the whole model. Decoding is native code with int8 weights, greedy after a prompt of 64 tokens, in
turns with the whole model. For passes given by ``--pass`` that choose layers as they go, perplexity and agreement are those of
decoding with these weights: of the 191 tokens of each sequence after its first 65, of which the text before them is given. The
ideal is the ratio of the bytes of weights that a step reads. ``--search``: the shares that evopress searches (``--settings`` of
the search). ``--rows`` keeps what was measured, so that a run that is interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
import torch
from chart import chart
from layer_speed import in_turns
from output import give
from perplexity import with_passes
from rich.console import Console
from torch.nn.functional import cross_entropy

import elision
from elision.ir.requests import Requests
from elision.ir.verify import Request
from elision.passes.base import from_text
from elision.passes.calibration import Text, topics
from elision.passes.layers.depth import evenly
from elision.passes.layers.skip_layers import SkipLayers
from elision.passes.pipeline import transform
from elision.runtime.report import weight_bytes
from elision.runtime.session import Session

LAYERS, PROMPT, DECODED = 30, 64, 256
METHODS = ("as it is", "random", "unified-skip", "shortgpt", "evopress", "skipdecode", "others")


@dataclass(frozen=True)
class Row:
    """One program: the method, the share of layers left out, and what was measured (``ideal``: 0 where it is not known)."""

    method: str
    share: float
    asked: str
    text: str
    perplexity: float
    agreement: float
    milliseconds: float
    speedup: float
    ideal: float


def methods(shares: Sequence[float], searched: Sequence[float], settings: str, draws: int) -> list[tuple[str, float, str]]:
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
    found += [("evopress", int(s * LAYERS + 1e-9) / LAYERS, f"evopress:share={s}{settings}") for s in searched]
    return found


def own(text: str) -> tuple[str, float, str]:
    """The row of a pass that was asked for."""
    step = from_text(text)
    known, share = step.name in METHODS, getattr(step, "share", 0.0)
    return (step.name, int(share * LAYERS + 1e-9) / LAYERS, text) if known and share else (METHODS[-1], 1.0, text)


def skipping(layers: Iterable[int]) -> str:
    return SkipLayers(tuple(sorted(layers))).text()


class Bench:
    """The whole model, what it says about the text, and its native form, beside which others run."""

    def __init__(self, tokens: int, threads: int) -> None:
        self.base = elision.compile("smollm2", target="reference", threads=threads)
        assert self.base.tokenizer is not None
        self.sequences = Text([topics(1)], self.base.tokenizer.encode).sequences(self.base.program, tokens)
        self._prompt = self.sequences[0][:PROMPT].tolist()
        self._greedy = [self.base(input_ids=ids[None]).logits[0].argmax(-1) for ids in self.sequences]
        self._whole = with_passes(self.base, ["int8"])[0]

    def row(self, method: str, share: float, asked: str) -> Row:
        base, passes = self.base, [asked] if asked else []
        assert base.tokenizer is not None
        program, weights = transform(base.program, base.weights, passes, Text(encode=base.tokenizer.encode))
        text = program.applied[-1] if asked else ""
        made = elision.Model(program, weights, tokenizer=None, defaults={}, coverage={}, max_context=2048, threads=base.threads)
        loss = same = 0.0
        for ids, greedy in zip(self.sequences, self._greedy, strict=True):
            logits = made(input_ids=ids[None]).logits[0]
            loss += cross_entropy(logits[:-1], ids[1:], reduction="sum").item()
            same += (logits.argmax(-1) == greedy).sum().item()
        count = sum(map(len, self.sequences))
        native = with_passes(base, [*([text] if text else []), "int8"])[0]
        perplexity = math.exp(loss / (count - len(self.sequences)))
        if method == METHODS[-1]:
            perplexity, same = self.decoded(native)
            same *= count
        turns = np.array([in_turns([self._whole, native], self._prompt, 97) for _ in range(3)])
        times, fixed = np.median(turns, axis=(0, 2)), method not in ("skipdecode", "others")
        gain, ideal = float(np.median(turns[:, 0] / turns[:, 1])), weight_bytes(self._whole) / weight_bytes(native)
        return Row(method, share, asked, text, perplexity, same / count, 1e3 * float(times[1]), gain, ideal if fixed else 0.0)

    def decoded(self, model: elision.Model | None = None) -> tuple[float, float]:
        """The perplexity of decoded tokens (of the whole model's, if no other is given), and how often the likeliest one there is
        the whole model's (`METHODS`, the last)."""
        model, loss, same = model or self._whole, 0.0, 0
        with torch.inference_mode():
            for ids, greedy in zip(self.sequences, self._greedy, strict=True):
                session = Session(model._interpreter, 1, DECODED)
                session.prefill([ids[:PROMPT].tolist()])
                for at in range(PROMPT, DECODED - 1):
                    requests = Seen([Request()], [ids[: at + 1]], [PROMPT])
                    same += session.round({0: int(ids[at])}, requests)[0][0] == int(greedy[at])
                    loss += cross_entropy(requests.logits, ids[at + 1 : at + 2]).item()
        count = (DECODED - PROMPT - 1) * len(self.sequences)
        return math.exp(loss / count), same / count


@dataclass
class Seen(Requests):
    """Keeps the logits of the round."""

    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def verify(self, ids: torch.Tensor, logits: torch.Tensor, *rest: Any, **more: Any) -> tuple[list[list[int]], torch.Tensor]:
        self.logits = logits.float().clone()
        return super().verify(ids, logits, *rest, **more)


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown; the draws of random layers are one line."""
    lines = ["| left out | method | perplexity | same greedy token | tokens/s | speed-up | of the ideal | pass |"]
    lines.append("|---" * 8 + "|")
    for (share, method), group in grouped(rows).items():
        found = [r.perplexity for r in group]
        spread = f" ({min(found):.4g} to {max(found):.4g})" if method == "random" and len(group) > 1 else ""
        shown = f"{median(found):.4g}{spread}"
        for row in group[:1] if method == "random" else group:
            seen = median(r.agreement for r in group) if method == "random" else row.agreement
            shown = shown if method == "random" else f"{row.perplexity:.4g}"
            gain, milliseconds = median(r.speedup for r in group), median(r.milliseconds for r in group)
            if method == "others":
                gain, milliseconds = row.speedup, row.milliseconds
            ideal = f"{gain / row.ideal:.2f}" if row.ideal > 1 else ""
            name, left = f"`{row.text}`" if row.text and method != "random" else "", "" if method == "others" else f"{share:.0%}"
            what = row.text.partition(":")[0] if method == "others" else method
            lines.append(f"| {left} | {what} | {shown} | {seen:.1%} | {1e3 / milliseconds:.0f} | {gain:.2f} | {ideal} | {name} |")
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
    parser.add_argument("--settings", default="", help="of the search, as in ',generations=15,large=2048'")
    parser.add_argument("--pass", action="append", dest="others", metavar="PASS", help="a row of its own")
    parser.add_argument("--rows", type=Path, help="where rows are kept, one line of JSON each")
    parser.add_argument("--output", type=Path, help="where the markdown table goes (default: standard output)")
    parser.add_argument("--plot", type=Path, help="where the plot goes")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("medium")  # its quickest products of floats
    console = Console(stderr=True, soft_wrap=True)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("elision").setLevel(logging.INFO)
    bench = Bench(args.tokens, args.threads)
    wanted, rows = methods(args.share, args.search, args.settings, args.draws), list[Row]()
    wanted = sorted(wanted + [own(text) for text in args.others or ()], key=lambda row: (row[1], METHODS.index(row[0])))
    lines = args.rows.read_text().splitlines() if args.rows and args.rows.exists() else []
    kept = {(row.method, row.share, row.asked): row for row in (Row(**json.loads(line)) for line in lines)}
    for i, (method, share, text) in enumerate(wanted, 1):
        row = kept.get((method, share, text))
        if row is None:
            row = bench.row(method, share, text)
            if args.rows:
                with args.rows.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
        rows.append(row)
        console.print(f"{i} of {len(wanted)}: {row}")
    head = f"smollm2, {sum(map(len, bench.sequences))} tokens in sequences of {len(bench.sequences[0])}, {args.threads} threads; "
    text = head + f"torch {torch.__version__}, Python {platform.python_version()}\n\n" + "\n".join(table(rows)) + "\n"
    if args.others:
        text += "\nThe whole model, decoded: perplexity {:.4g}, the same token {:.1%}\n".format(*bench.decoded())
    give(text, args.output)
    if args.plot:
        found: dict[str, dict[float, float]] = {}
        for (share, method), group in grouped(rows).items():
            if method not in (METHODS[0], METHODS[-1]):
                found.setdefault(method, {0.0: rows[0].perplexity})[100 * share] = median(r.perplexity for r in group)
        args.plot.write_text(chart("Layers left out, %", "Perplexity", found), encoding="utf-8")


if __name__ == "__main__":
    main()
