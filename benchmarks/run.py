"""Measures what the README shows, and draws it: `python benchmarks/run.py [PART ..] [--draw] [--peers PYTHON]`.

Parts: cpu (against the peers), torch-compile, memory (artefacts as they are opened); kv, layers, weights, tokens (quality
against speed of every method of a family); speculate (speed, since the tokens are the same). A part keeps its raw samples, with
the date and the machine, in `benchmarks/results/raw/PART.json`, in the place of the last ones when it has ended well. Then
everything is drawn from what is kept, `--draw` does that alone: tables between marks in README.md, pictures in `docs/figures/`.
Parts take from 1 to 15 minutes each on two cores, and want the machine for themselves. The engines of the peers may live in an
environment of their own, ``--peers``, beside Elision's requirements.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
RAW, FIGURES = ROOT / "benchmarks" / "results" / "raw", ROOT / "docs" / "figures"
COMMANDS = {
    "cpu": ["cpu.py", "--raw"],
    "torch-compile": ["torch_compile.py", "--raw"],
    "memory": ["memory.py", "--raw"],
    "kv": ["frontier.py", "kv", "--rows"],
    "layers": ["frontier.py", "layers", "--rows"],
    "weights": ["frontier.py", "weights", "--rows"],
    "tokens": ["tokens.py", "--part", "encoder", "--raw"],
    "speculate": ["speculation.py", "--formats", "fp32", "--prompts", "6", "--tokens", "96", "--raw"],
}
LEAST = 1e-4  # of a divergence, that a picture shows
FAMILIES = {"kv": "unmodified model, cache of floats", "layers": "all layers", "weights": "weights of 32 bits"}

#: Engines of the README's table by bits of the weights: what the row says, and the names of `benchmarks/cpu.py`.
ENGINES = {
    "32 bits": {
        "**elision**": "elision:fp32, kv bf16",
        "llama.cpp, F32": "llama.cpp:F32",
        "transformers": "transformers:float32",
    },
    "16 bits": {"**elision**, `bf16`": "elision:bf16, kv bf16", "llama.cpp, F16": "llama.cpp:F16"},
    "8 bits": {"**elision**, `int8` `a8`": "elision:int8 a8, kv bf16", "llama.cpp, Q8_0": "llama.cpp:Q8_0"},
    "4 bits": {
        "**elision**, `stored` `a8` (the file's Q4_1)": "elision:Q4_1 a8, kv bf16",
        "**elision**, `stored`: the file's numbers": "elision:Q4_1, kv bf16",
        "llama.cpp, Q4_0": "llama.cpp:Q4_0",
        "llama.cpp, Q4_1": "llama.cpp:Q4_1",
        "onnxruntime-genai, int4": "onnxruntime-genai:int4",
        "openvino-genai, Q4_1": "openvino-genai:Q4_1",
    },
}


#: Says the versions that a Python measures with.
_VERSIONS = """
import json, platform, torch, transformers
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}))
"""


def machine(python: str) -> dict[str, Any]:
    """What a reader must know to compare, of the Python that measured."""
    said = subprocess.run([python, "-c", _VERSIONS], check=True, capture_output=True, text=True).stdout
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return {
        "date": datetime.date.today().isoformat(),
        "processor": model[1] if model else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        **json.loads(said.splitlines()[-1]),
    }


def measure(part: str, python: str) -> None:
    """Run a part, and keep what it gave."""
    script, *options = COMMANDS[part]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        subprocess.run([python, str(ROOT / "benchmarks" / script), *options, str(rows)], check=True)
        keep(part, [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()], python)


def keep(part: str, found: list[dict[str, Any]], python: str) -> None:
    RAW.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in found)
    (RAW / f"{part}.json").write_text(f'{{"machine": {json.dumps(machine(python))}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def kept(part: str) -> dict[str, Any]:
    return json.loads((RAW / f"{part}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def engines(found: dict[str, Any]) -> list[str]:
    """The README's first table: medians of each engine."""
    seen = {row["engine"]: row["samples"] for row in found["rows"] if "engine" in row}
    lines = ["| weights | engine | tokens/s at context 64 | at context 2048 | first token of 1024 |", "|---|---|---|---|---|"]
    for bits, group in ENGINES.items():
        for label, name in group.items():
            if name in seen:
                short, long, first = (statistics.median(seen[name][w]) for w in ("decode 64", "decode 2048", "first token 1024"))
                lines.append(f"| {bits} | {label} | {1e3 / short:.0f} | {1e3 / long:.0f} | {first:.2f} s |")
                bits = ""
    return lines


def calls(found: dict[str, Any]) -> list[str]:
    """Medians of the calls behind torch.compile."""
    lines = ["| behind `torch.compile`, ms | eager | Inductor | Elision | Inductor / Elision |", "|---|---:|---:|---:|---:|"]
    for row in found["rows"]:
        eager, inductor, ours = (1e3 * statistics.median(row["seconds"][e]) for e in ("eager", "inductor", "elision"))
        lines.append(f"| {row['call']} | {eager:.2f} | {inductor:.2f} | {ours:.2f} | {inductor / ours:.2f} |")
    return lines


def opened(found: dict[str, Any]) -> list[str]:
    """An artefact of each format as it is opened."""
    lines = ["| artefact | file, MB | first token after, s | not verified, s | memory over weights and states, MB |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(row["format"] for row in found["rows"]):
        sure, fast = ([r for r in found["rows"] if r["format"] == name and r["verify"] is v][-1] for v in (True, False))
        over = (sure["over"] - sure["states"]) / 1e6
        lines.append(f"| {name} | {sure['file'] / 1e6:.0f} | {sure['first']:.2f} | {fast['first']:.2f} | {over:.0f} |")
    return lines


def speedups(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Plain over speculative decoding by the clock on the wall, by kind of text and drafters; medians over prompts."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["kind"], {})[row["drafters"]] = statistics.median(s["wall"] for s in row["samples"])
    return found


def drafters(found: dict[str, Any]) -> list[str]:
    """What sets of drafters gain, by kind of text."""
    kinds = speedups(found["rows"])
    lines = [f"| speed-up of decoding, 32 bits | {' | '.join(kinds)} | mean |", "|---" + "|---:" * (len(kinds) + 1) + "|"]
    for name in next(iter(kinds.values())):
        gains = [kind[name] for kind in kinds.values()]
        told = " + ".join(f"`{drafter}`" for drafter in name.split(" + "))
        lines.append(f"| {told} | {' | '.join(f'{gain:.2f}' for gain in gains)} | {statistics.mean(gains):.2f} |")
    return lines


def frontier(part: str, rows: list[dict[str, Any]]) -> str:
    """The picture of a family, SVG: what decoding gains, and how far its distributions are from the unmodified model's."""
    from chart import chart

    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["passes"]:
            found.setdefault(row["method"], {})[row["speedup"]] = max(row["divergence"], LEAST)
    up = f"divergence from the unmodified model, nats (at least {LEAST})"
    return chart(f"speed-up of decoding (1: {FAMILIES[part]})", up, found)


def merged(part: str, rows: list[dict[str, Any]]) -> str:
    """The picture of the family tokens, SVG: what an encoder gains, and whether it still tells texts apart as it did."""
    from chart import chart

    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["passes"]:
            found.setdefault(row["method"], {1.0: 1.0})[row["speedup"]] = row["correlation"]
    return chart("speed-up of all-MiniLM-L6-v2, texts of 512 tokens", "rank correlation of similarities", found, linear=True)


def drafted(part: str, rows: list[dict[str, Any]]) -> str:
    """The picture of the family speculate, SVG: what drafters gain on kinds of text."""
    from chart import bars

    return bars("speed-up of decoding, tokens the same", speedups(rows), level=1.0)


TABLES = {"cpu": engines, "torch-compile": calls, "memory": opened, "speculate": drafters}
PICTURES = {"kv": frontier, "layers": frontier, "weights": frontier, "tokens": merged, "speculate": drafted}


def between(text: str, mark: str, lines: list[str]) -> str:
    """The text with the lines in the place of what is between its marks. ValueError if it has no such marks."""
    begin, end = f"<!-- {mark}: made by benchmarks/run.py -->", f"<!-- end of {mark} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"README.md has no marks {begin} and {end}")
    return "\n".join([before + begin, "", *lines, "", end + after])


def readme(text: str) -> str:
    """The README with the tables that what is kept gives."""
    for part, table in TABLES.items():
        if not (RAW / f"{part}.json").exists():
            continue
        found = kept(part)
        on = found["machine"]
        told = f"Measured on {on['date']}: {on['processor']}, {on['cores']} cores; torch {on['torch']}."
        text = between(text, part, [*table(found), "", told])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(COMMANDS)} (default: all)")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what is kept")
    parser.add_argument("--peers", default=sys.executable, help="the Python that runs the part cpu (default: this one)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(COMMANDS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(COMMANDS)}")
    console = Console(stderr=True)
    for part in [] if args.draw else args.parts or COMMANDS:
        console.rule(part)
        measure(part, args.peers if part == "cpu" else sys.executable)
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(encoding="utf-8")), encoding="utf-8")
    FIGURES.mkdir(parents=True, exist_ok=True)
    for part, picture in PICTURES.items():
        if (RAW / f"{part}.json").exists():
            (FIGURES / f"{part}.svg").write_text(picture(part, kept(part)["rows"]), encoding="utf-8")


if __name__ == "__main__":
    main()
