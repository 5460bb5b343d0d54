"""Compressed caches in use: tokens per second, time to the first token and bytes of state, beside kvpress.

    python benchmarks/kv_speed.py time DIR bf16 int8           appends JSON lines to DIR/speed.jsonl
    python benchmarks/kv_speed.py kvpress DIR --python PYTHON  the same, of kvpress (`benchmarks/kvpress_peer.py`)
    python benchmarks/kv_speed.py table DIR                    what is in DIR/speed.jsonl

One prompt of random tokens, greedy; caches are in bf16. Every run of Elision is one `generate`. The time of a token is that of
the fastest 16 in a row, ticks of the clock among them, since other work on a machine only ever adds time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CONTEXTS, NEW = (2048, 8000), 65
WEIGHTS = {"bf16": ["bf16"], "int8": ["int8:group=32", "a8"]}
WHOLE = "all of it"


def methods(context: int) -> dict[str, list[str]]:
    """Passes by name, for what they keep of a context."""
    found: dict[str, list[str]] = {WHOLE: []}
    for share in (2, 4):
        n, percent = context // share, 100 // share
        found |= {
            f"streaming-llm, {percent} %": [f"streaming-llm:window={n - 4}"],
            f"h2o, {percent} %": [f"h2o:budget={n},recent={n // 2}"],
            f"snapkv, {percent} %": [f"snapkv:budget={n}"],
        }
    heads = "+".join(map(str, range(0, 90, 4)))  # of SmolLM2's 90 key heads: speed does not depend on which
    return found | {
        "quest, 25 %": [f"quest:budget={context // 4}"],
        "duo-attention, 25 % of heads": [f"duo-attention:heads={heads}"],
    }


def fastest(times: Sequence[float]) -> float:
    """Seconds of a token among the fastest 16 in a row."""
    return min(b - a for a, b in zip(times, times[16:], strict=False)) / 16


def timed(weights: str, threads: int) -> Iterator[dict[str, Any]]:
    import torch
    from variants import variants

    runs = [(context, *run) for context in CONTEXTS for run in methods(context).items()]
    models = variants(WEIGHTS[weights], (passes for *_, passes in runs), threads)
    for (context, name, _), model in zip(runs, models, strict=True):
        ids = torch.randint(100, 40000, (1, context), generator=torch.Generator().manual_seed(0))
        model.generate(ids[:, :64], max_new_tokens=8, eos_token_id=[], do_sample=False)  # code is linked, weights are packed
        times: list[float] = []

        def seen(*_: Any, times: list[float] = times) -> None:
            times.append(time.perf_counter())

        model.generate(ids, max_new_tokens=NEW, eos_token_id=[], do_sample=False, streamer=seen)
        s = model.stats
        assert s is not None and len(times) == NEW
        yield {
            "engine": "elision", "weights": weights, "context": context, "name": name, "first": s.time_to_first_token,
            "token": fastest(times), "state": s.state_bytes, "prompt": s.prompt_state_bytes,
        }  # fmt: skip


def kvpress(directory: Path, python: str, threads: int) -> Iterator[dict[str, Any]]:
    from peers import huggingface

    script = Path(__file__).with_name("kvpress_peer.py")
    command = [python, str(script), str(huggingface(directory)), str(threads), *map(str, CONTEXTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            row = json.loads(line)
            name = f"kvpress, {WHOLE if row['name'] == 'nothing' else row['name'] + ' 0.5'}"
            yield {"engine": "kvpress", "weights": "bf16", **row, "name": name}


def table(directory: Path) -> Iterator[str]:
    """Against the uncompressed run of Elision with the same weights."""
    found = [json.loads(line) for line in (directory / "speed.jsonl").read_text().splitlines()]
    ratios = "tokens/s, of all of it | first token, of all of it | state, of all of it"
    yield f"| context | weights | cache | {ratios} | tokens/s | first token, s | state, MB | while the prompt came in, MB |"
    yield "|---:|---|---|" + "---:|" * 7
    for context in CONTEXTS:
        for weights in WEIGHTS:
            rows = [r for r in found if (r["context"], r["weights"]) == (context, weights)]
            whole = [r for r in rows if r["engine"] == "elision" and r["name"] == WHOLE]
            if not whole:
                continue
            base = whole[0]
            for row in rows:
                ratios = [base["token"] / row["token"], row["first"] / base["first"], row["state"] / base["state"]]
                numbers = [f"{1 / row['token']:.1f}", f"{row['first']:.2f}", f"{row['state'] / 1e6:.1f}"]
                numbers.append(f"{row['prompt'] / 1e6:.1f}" if "prompt" in row else "")
                cells = [str(context), weights, row["name"], *(f"{x:.2f}" for x in ratios), *numbers]
                yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "kvpress", "table"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("weights", nargs="*", help="bf16, int8")
    parser.add_argument("--python", default=sys.executable, help="of an environment with kvpress")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "table":
        print("\n".join(table(args.directory)))
    else:
        runs = (
            kvpress(args.directory, args.python, args.threads)
            if args.what == "kvpress"
            else (row for weights in args.weights for row in timed(weights, args.threads))
        )
        with open(args.directory / "speed.jsonl", "a") as out:
            for row in runs:
                print(json.dumps(row), file=out, flush=True)
                print(row, flush=True)


if __name__ == "__main__":
    main()
