"""Compressed caches in use: tokens per second, time to the first token and bytes of state, beside kvpress.

    python benchmarks/kv_speed.py compile DIR [bf16|int8]      SmolLM2 with every method, as artefacts: a run begins at once
    python benchmarks/kv_speed.py time DIR bf16|int8           appends JSON lines to DIR/speed.jsonl
    python benchmarks/kv_speed.py kvpress DIR --python PYTHON  the same, of kvpress (`benchmarks/kvpress_peer.py`)
    python benchmarks/kv_speed.py table DIR                    what is in DIR/speed.jsonl

One prompt of random tokens, greedy; caches are in bf16. Every run of Elision is one `generate`, the uncompressed one first and
last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
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
        whole = "+".join(map(str, range(0, 90, share)))  # of SmolLM2's 90 key heads: speed does not depend on which
        found |= {
            f"streaming-llm, {percent} %": [f"streaming-llm:window={n - 4}"],
            f"h2o, {percent} %": [f"h2o:budget={n},recent={n // 2}"],
            f"snapkv, {percent} %": [f"snapkv:budget={n}"],
            f"quest, {percent} %": [f"quest:budget={n}"],
            f"duo-attention, {percent} % of the heads": [f"duo-attention:heads={whole}"],
        }
    return found


def artefact(directory: Path, weights: str, passes: list[str]) -> Path:
    name = "-".join([weights, *passes]).replace(":", "-").replace("+", "")
    return directory / f"{name[:80]}.elision"


def compiled(directory: Path, kinds: list[str]) -> None:
    import elision

    for weights in kinds:
        for context in CONTEXTS:
            for passes in methods(context).values():
                path = artefact(directory, weights, passes)
                if not path.exists():
                    elision.compile("smollm2", passes=[*WEIGHTS[weights], *passes], kv_dtype="bf16").save(path)
                    print(path, flush=True)


def timed(directory: Path, weights: str, threads: int) -> Iterator[dict[str, Any]]:
    import torch

    import elision

    for context in CONTEXTS:
        ids = torch.randint(100, 40000, (1, context), generator=torch.Generator().manual_seed(0))
        for name, passes in [*methods(context).items(), (WHOLE, [])]:
            model = elision.load(artefact(directory, weights, passes), threads=threads, verify=False)
            model.generate(ids[:, :64], max_new_tokens=8, eos_token_id=[], do_sample=False)  # weights are read from the file
            model.generate(ids, max_new_tokens=NEW, eos_token_id=[], do_sample=False)
            s = model.stats
            assert s is not None
            yield {
                "engine": "elision", "weights": weights, "context": context, "name": name, "first": s.time_to_first_token,
                "token": 1 / s.tokens_per_second, "state": s.state_bytes, "prompt": s.prompt_state_bytes,
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
    """Against the uncompressed run of Elision with the same weights, of which the faster one counts."""
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
            base = whole[0] | {key: min(r[key] for r in whole) for key in ("first", "token", "state")}
            for row in [base, *(r for r in rows if r not in whole)]:
                ratios = [base["token"] / row["token"], row["first"] / base["first"], row["state"] / base["state"]]
                numbers = [f"{1 / row['token']:.1f}", f"{row['first']:.2f}", f"{row['state'] / 1e6:.1f}"]
                numbers.append(f"{row['prompt'] / 1e6:.1f}" if "prompt" in row else "")
                cells = [str(context), weights, row["name"], *(f"{x:.2f}" for x in ratios), *numbers]
                yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compile", "time", "kvpress", "table"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("weights", nargs="*", choices=[*WEIGHTS, []], default=[])
    parser.add_argument("--python", default=sys.executable, help="of an environment with kvpress")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.what == "compile":
        args.directory.mkdir(parents=True, exist_ok=True)
        compiled(args.directory, args.weights or list(WEIGHTS))
    elif args.what == "table":
        print("\n".join(table(args.directory)))
    else:
        runs = (
            kvpress(args.directory, args.python, args.threads)
            if args.what == "kvpress"
            else (row for weights in args.weights for row in timed(args.directory, weights, args.threads))
        )
        with open(args.directory / "speed.jsonl", "a") as out:
            for row in runs:
                print(json.dumps(row), file=out, flush=True)
                print(row, flush=True)


if __name__ == "__main__":
    main()
