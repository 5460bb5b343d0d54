"""Models with the shapes of large ones on a GPU: right or wrong, and how near to the floor.

    python benchmarks/gpu.py [--model llama-3-8b] [--layers 32] [--minutes 9] [--parts checks+decode] [--output NAME.json]
    python benchmarks/gpu.py --dry-run         all of it on tiny models under Triton's interpreter: no GPU, and no figures

Weights are random numbers; every layer has memory of its own. Machine code is made for the GPU at hand before anything is timed.
Decoding is one graph launched again and again without the host; a time is the mean over so many launches that they last a while,
the best of three. The floor of a step is the bytes that it must read (weights, and the keys and values of the contexts) over the
bandwidth at which this GPU reads the largest weight with our own product of one token. Where torch sees the GPU, its own
attention (`scaled_dot_product_attention`) and transformers with a static cache under `torch.compile` are timed beside ours. What
does not fit into the memory or into ``--minutes`` is left out, and said so. Parts print how long they may take (estimates, until
somebody has run it) and took; ``--output`` has every number, with the date, the device and the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

import torch
from gpu_checks import errors
from gpu_peers import sdpa_time, transformers_time
from gpu_shapes import SHAPES, shaped
from gpu_steps import RandomWeights, attention_time, context_bytes, read_bandwidth, round_time, step_time

from elision.codegen.triton.ahead import build, totals
from elision.codegen.triton.compile import plan_program
from elision.codegen.triton.interpreted import Interpreted
from elision.ir.launch import DeviceCode
from elision.runtime.cuda.driver import Cuda, capability
from elision.runtime.cuda.engine import Engine

#: A result: what it is of, and its numbers.
Row = dict[str, Any]
INT4 = ("int4:group=32",)
#: Passes of a variant, and the format of a file in the place of int4.
VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "bf16": ((), ""), "int4": (INT4, ""), "Q4_K": (INT4, "Q4_K"), "Q6_K": (INT4, "Q6_K"), "int8": (("int8",), ""),
    "bf16, kv int8": (("insert-cache:dtype=int8",), ""),
}  # fmt: skip
MEMORY = 110e9  # bytes that weights and caches may take together


@dataclass(frozen=True)
class Sizes:
    """What is run: the model, layers, the shortest time that is measured, batches and contexts, those of attention alone, the
    budget of h2o, layers beside transformers, nodes of a tree."""

    model: str
    layers: int
    least: float
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    attended: tuple[tuple[int, int], ...]
    budget: int
    peers: int
    nodes: int = 16


DRY = Sizes("tiny", 1, 0.0, (1, 2), (20,), ((2, 20),), 20, 1)


class Bench:
    """Engines by variant, one at a time, and what several parts need."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.dry = sizes, sizes.least == 0
        self.target = "" if self.dry else f"cuda:sm_{''.join(map(str, capability()))}"
        self.bandwidth = self.step = 0.0  # of the first variant: bytes a second; seconds of its first step
        self._engine: tuple[Any, Engine, RandomWeights] | None = None

    def engine(self, variant: str, name: str = "", layers: int = 0, more: tuple[str, ...] = ()) -> tuple[Engine, RandomWeights]:
        key = (variant, name or self.sizes.model, layers or self.sizes.layers, more)
        if self._engine is None or self._engine[0] != key:
            self.free()
            passes, stored = VARIANTS[variant]
            program = shaped(key[1], (*passes, *more), key[2], stored)
            code, weights = plan_program(program), RandomWeights(program)
            self._engine = (key, Engine(program, code, weights, self._device(code)), weights)
        return self._engine[1], self._engine[2]

    def _device(self, code: DeviceCode) -> Any:
        if self.dry:
            return Interpreted(code.kernels)
        build(code, [self.target], workers=8)
        return Cuda(code)

    def free(self) -> None:
        if self._engine is not None:
            self._engine[1].free()
            self._engine = None


def checks(bench: Bench) -> Iterator[Row]:
    """Products, projections and attention launch by launch against float64, of one layer: for one token, few, some and many."""
    for variant in VARIANTS:
        dry = bench.dry
        if dry and variant in ("Q4_K", "int8"):  # blocks of 256 take the interpreter long: one of the two
            continue
        name = "medium" if not dry else "small" if variant.startswith("Q") else bench.sizes.model
        engine, weights = bench.engine(variant, name, 1)
        worst: dict[str, float] = {}
        for rows, prompt in ((1, 2),) if dry else ((1, 300), (8, 33), (40, 5)):
            for label, found, most in errors(engine, weights, rows, prompt):
                worst[label] = max(worst.get(label, 0.0), found)
                if not found <= most:
                    raise SystemExit(f"wrong: {variant}, {label}: differs by {found:.1e} of the largest number, at most {most}")
        yield {"variant": variant, "launches": len(worst), "largest error": max(worst.values()), "errors": worst}


def decode(bench: Bench, variants: tuple[str, ...] = ("bf16",)) -> Iterator[Row]:
    sizes = bench.sizes
    for variant in variants:
        start = time.monotonic()
        engine, weights = bench.engine(variant)
        if not bench.dry:
            yield {"variant": variant, "compiled and loaded": time.monotonic() - start, **totals(engine.code, bench.target)}
        if not bench.bandwidth:
            bench.bandwidth = read_bandwidth(engine, sizes.least)
            yield {"variant": variant, "TB/s": bench.bandwidth / 1e12}
        for rows in sizes.batches if variant == "bf16" else (1,):
            for context in sizes.contexts:
                at = {"variant": variant, "batch": rows, "context": context}
                read = weights.nbytes() + context_bytes(engine.program, rows, context)
                if read > MEMORY:
                    yield at | {"left out": "memory"}
                    continue
                one = step_time(engine, rows, context, 1, sizes.least)
                bench.step = bench.step or one
                yield at | {"ms": one * 1e3, "of the floor": read / bench.bandwidth / one, "times the first": bench.step / one}


def encoded(bench: Bench) -> Iterator[Row]:
    return decode(bench, ("bf16, kv int8", "int8") if bench.dry else tuple(v for v in VARIANTS if v != "bf16"))


def verify(bench: Bench) -> Iterator[Row]:
    """A tree beside one token, and a whole round (verified, walked, committed) that the host reads nothing of."""
    sizes = bench.sizes
    engine, _ = bench.engine("bf16")
    for context in sizes.contexts:
        one, tree = (step_time(engine, 1, context, n, sizes.least) for n in (1, sizes.nodes))
        yield {"nodes": sizes.nodes, "context": context, "ms": tree * 1e3, "times one token": tree / one}
    spent = round_time(engine, 1, sizes.contexts[0], sizes.nodes, sizes.least)
    yield {"round of nodes": sizes.nodes, "context": sizes.contexts[0], "ms": spent * 1e3}


def attention(bench: Bench) -> Iterator[Row]:
    """A layer's attention beside torch's, and what the scores of h2o add."""
    sizes, alone = bench.sizes, dict[tuple[int, int], float]()
    device = "cpu" if bench.dry else "cuda" if torch.cuda.is_available() else ""
    engine, _ = bench.engine("bf16")
    for rows, context in sizes.attended:
        alone[rows, context] = ours = attention_time(engine, sizes.layers, rows, context, sizes.least)
        row = {"batch": rows, "context": context, "us": ours * 1e6}
        if device:
            theirs = sdpa_time(sizes.model, rows, context, sizes.least, device)
            row |= {"torch us": theirs * 1e6, "times torch": ours / theirs}
        yield row
    engine, _ = bench.engine("bf16", more=(f"h2o:budget={sizes.budget},recent=4",))
    for rows, context in sizes.attended:
        if context == sizes.budget:
            spent = attention_time(engine, sizes.layers, rows, context, sizes.least)
            yield {"h2o's scores too, batch": rows, "us": spent * 1e6, "times alone": spent / alone[rows, context]}


def peers(bench: Bench) -> Iterator[Row]:
    """Steps of transformers with a static cache under torch.compile, beside ours of as many layers."""
    sizes = bench.sizes
    device = "cpu" if bench.dry else "cuda" if torch.cuda.is_available() else ""
    if not device:
        yield {"left out": "torch sees no GPU"}
        return
    engine, _ = bench.engine("bf16", layers=sizes.peers)
    context = sizes.contexts[0]
    ours = step_time(engine, 1, context, 1, sizes.least)
    bench.free()
    theirs = transformers_time(sizes.model, sizes.peers, context, sizes.least, device)
    yield {"layers": sizes.peers, "context": context, "ms": ours * 1e3, "theirs": theirs * 1e3, "times faster": theirs / ours}


#: In order, with the seconds that each may take on an H200 (estimates): those that share an engine one after the other.
PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row]], int]] = {
    "checks": (checks, 110), "decode": (decode, 70), "verify": (verify, 25), "attention": (attention, 45), "peers": (peers, 90),
    "encoded": (encoded, 150),
}  # fmt: skip


def machine(bench: Bench) -> Row:
    """When and where."""
    found: Row = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "target": bench.target, "device": "the interpreter: no figures"}
    if not bench.dry:
        ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            found["device"] = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            found["device"] = "an NVIDIA GPU"
    found["platform"], found["python"] = platform.platform(), platform.python_version()
    for name in ("elision", "torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def shown(row: Row, dry: bool) -> str:
    """A line; of a dry run no numbers that would be taken for figures."""
    told = {k: v for k, v in row.items() if not isinstance(v, dict) and not (dry and isinstance(v, float))}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items()) + (": ran" if dry else "")


def run(bench: Bench, names: list[str], minutes: float) -> Row:
    """All results. Parts that might not end in time are left out."""
    began, found = time.monotonic(), machine(bench) | {"sizes": str(bench.sizes), "parts": list[Row]()}
    for name in names:
        part, estimate = PARTS[name]
        start = time.monotonic()
        made: Row = {"part": name, "estimate": estimate, "rows": list[Row]()}
        found["parts"].append(made)
        if start - began + (0 if bench.dry else estimate) > 60 * minutes:
            made["left out"] = "time"
            print(f"## {name}: left out (time)", flush=True)
            continue
        print(f"## {name}" + ("" if bench.dry else f": about {estimate} s"), flush=True)
        for row in part(bench):
            made["rows"].append(row)
            print(shown(row, bench.dry), flush=True)
            if time.monotonic() - began > 60 * minutes:
                made["left out"] = "the rest: time"
                break
        made["seconds"] = time.monotonic() - start
        print(f"{name} took {made['seconds']:.0f} s", flush=True)
    bench.free()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--parts", default="+".join(PARTS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    attended = ((1, 8192), (8, 8192), (1, 32768))
    whole = Sizes(options.model, options.layers, 0.2, (1, 8, 64), (1024, 8192, 32768), attended, 8192, min(8, options.layers))
    found = run(Bench(DRY if options.dry_run else whole), options.parts.split("+"), options.minutes)
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
