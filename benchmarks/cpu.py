"""SmolLM2-135M on the CPU, side by side with the engines that people use: decoding, verification,
time to first token, and the floor.

    python benchmarks/cpu.py [--engines "elision:fp32;llama.cpp:F32"] [--rounds 3] [--output benchmarks/results/NAME.md]

Every engine has a process of its own that waits between its turns; the turns of all engines are interleaved, and the read
bandwidth of our own native kernel is measured between them. The floor of a step is the bytes that must be read (weights, and the
keys and values of the context) over that bandwidth; that of a prompt its FLOPs (body, half of full attention, one row of the
head) over the best rate of torch's fp32 GEMM on the model's shapes, measured in between too. Prompts are the same random tokens
for all, threads are as many.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
WORK = {"decode 64": (64, 96), "decode 2048": (2048, 32), "first token 1024": (1024, 1)}
VERIFY = {"step of 1": (64, 1), "step of 8": (64, 8)}  # context and drafted tokens
PREFILL_FLOPS = 254e9  # of 1024 tokens
KV = 30 * 2 * 3 * 64  # numbers that a token adds to the cache

#: Engine to (bytes of weights read per token, bytes of a cached number); None: not ours, no floor of its own.
ENGINES: dict[str, tuple[list[str], str | None] | None] = {
    "elision:fp32": ([], None),
    "elision:fp32, kv bf16": ([], "bf16"),
    "elision:bf16, kv bf16": (["bf16"], "bf16"),
    "elision:int8, kv bf16": (["int8:group=32"], "bf16"),
    "elision:int8 a8, kv bf16": (["int8:group=32", "a8"], "bf16"),
    "elision:Q4_1, kv bf16": (["stored"], "bf16"),
    "elision:Q4_1 a8, kv bf16": (["stored", "a8"], "bf16"),
    "transformers:float32": None,
    "llama.cpp:F32": None,
    "llama.cpp:F16": None,
    "llama.cpp:Q8_0": None,
    "llama.cpp:Q4_0": None,
    "llama.cpp:Q4_1": None,
    "onnxruntime-genai:int4": None,
    "openvino-genai:Q4_1": None,
}


def load(name: str, folder: Path) -> tuple[Callable[[list[int], int], list[float]], dict[str, Any], Any]:
    """An engine, facts about it, and its model if it is ours."""
    import peers

    engine, _, kind = name.partition(":")
    if engine == "elision":
        found = ENGINES[name]
        assert found is not None
        run, model = peers.elision(found[0], THREADS, found[1])
        report = model.report
        return run, {"weights": report["weight_bytes"], "kv": 2 if found[1] else 4}, model
    if engine == "transformers":
        return peers.transformers(kind, THREADS), {}, None
    if engine == "llama.cpp":
        return peers.llama_cpp(peers.gguf_file() if kind == "Q4_1" else peers.converted(folder, kind), THREADS), {}, None
    if engine == "onnxruntime-genai":
        return peers.onnxruntime_genai(folder, THREADS), {}, None
    return peers.openvino_genai(peers.gguf_file(), THREADS), {}, None


def serve(name: str, folder: Path) -> None:
    """The process of one engine: answers every line ``[prompt tokens, new tokens, 0]`` with the times of the tokens, and
    ``[context, 0, drafted tokens]`` with those of steps."""
    import random

    import peers

    out = sys.stdout
    sys.stdout = sys.stderr  # engines print
    run, facts, model = load(name, folder)
    run([1, 2, 3], 4)
    print(json.dumps(facts), file=out, flush=True)
    for line in sys.stdin:
        prompt, new, nodes = json.loads(line)
        if nodes:
            print(json.dumps(peers.step_seconds(model, prompt, nodes)), file=out, flush=True)
            continue
        ids = random.Random(prompt).choices(range(1000, 40000), k=prompt)
        print(json.dumps(run(ids, new)), file=out, flush=True)


class Worker:
    """The process of an engine, from outside."""

    def __init__(self, name: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--serve", name, "--folder", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer()

    def run(self, prompt: int, new: int, nodes: int = 0) -> list[float]:
        assert self._process.stdin is not None
        print(json.dumps([prompt, new, nodes]), file=self._process.stdin, flush=True)
        return self._answer()  # type: ignore[no-any-return]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=";".join(ENGINES), help="names, separated by ;")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--raw", type=Path, help="where the samples go, a line of JSON for each engine")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "elision-peers", help="for converted models")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.serve:
        serve(args.serve, args.folder)
        return
    facts, samples, bandwidths, rates = measure(args.engines.split(";"), args.rounds, args.folder)
    text = report(facts, samples, bandwidths, rates)
    print(text)
    if args.raw:
        rows: list[dict[str, Any]] = [{"bandwidths": bandwidths, "rates": rates}]
        rows += [{"engine": name, "facts": facts[name], "samples": found} for name, found in samples.items()]
        args.raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if args.output:
        args.output.write_text(text)


Samples = dict[str, dict[str, list[float]]]


def gemm_rate() -> float:
    """FLOP/s of torch's fp32 GEMM, the best of the model's shapes."""
    import torch

    torch.set_num_threads(THREADS)
    best = 0.0
    for n, k in ((1536, 576), (576, 1536), (576, 576), (192, 576)):
        x, w = torch.randn(1024, k), torch.randn(k, n)
        for _ in range(5):
            start = time.perf_counter()
            x @ w
            best = max(best, 2 * 1024 * k * n / (time.perf_counter() - start))
    return best


def measure(names: list[str], rounds: int, folder: Path) -> tuple[dict[str, dict[str, Any]], Samples, list[float], list[float]]:
    """Facts, samples (ms per token or step, or seconds to the first token) by engine and work, and the bandwidths and GEMM rates
    seen in between."""
    from rich.progress import Progress

    from elision.codegen.cpu.probe import Bandwidth

    probe = Bandwidth(THREADS)
    facts: dict[str, dict[str, Any]] = {}
    samples: Samples = {}
    bandwidths: list[float] = []
    rates: list[float] = []
    with Progress() as progress:
        task = progress.add_task("loading", total=len(names) + rounds * len(names))
        workers: dict[str, Worker] = {}
        for name in names:
            progress.update(task, description=f"loading {name}")
            try:
                workers[name] = Worker(name, folder)
                facts[name] = workers[name].facts
                ours = VERIFY if name.startswith("elision") else {}
                samples[name] = {work: [] for work in (*WORK, *ours)}
            except RuntimeError as err:
                progress.console.print(f"{name}: {err}")
            progress.advance(task)
        for _ in range(rounds):
            for name, worker in workers.items():
                progress.update(task, description=name)
                bandwidths.append(probe.measure())
                rates.append(gemm_rate())
                for work, (prompt, new) in WORK.items():
                    times = worker.run(prompt, new)
                    value = times[0] if new == 1 else (times[-1] - times[0]) / (len(times) - 1) * 1e3
                    samples[name][work].append(value)
                for work, (context, nodes) in VERIFY.items():
                    if work in samples[name]:
                        samples[name][work].append(statistics.median(worker.run(context, 0, nodes)) * 1e3)
                progress.advance(task)
        for worker in workers.values():
            worker.close()
    return facts, samples, bandwidths, rates


def report(facts: dict[str, dict[str, Any]], samples: Samples, bandwidths: list[float], rates: list[float]) -> str:
    """The table as Markdown, raw samples below it."""
    speed, rate = statistics.median(bandwidths), statistics.median(rates)
    lines = [
        "# SmolLM2-135M-Instruct on the CPU",
        "",
        f"{platform.processor() or platform.machine()}, {THREADS} threads; Python {platform.python_version()}; medians of "
        f"{max(len(x) for s in samples.values() for x in s.values())} interleaved rounds. Read bandwidth of our native kernel: "
        f"{speed / 1e9:.1f} GB/s (from {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f}); best fp32 GEMM of torch: "
        f"{rate / 1e9:.0f} GFLOP/s (from {min(rates) / 1e9:.0f} to "
        f"{max(rates) / 1e9:.0f}).",
        "",
        "| engine | ms/token, context 64 | tokens/s | of the floor | ms/token, context 2048 | tokens/s | of the floor | "
        "s to first of 1024 | of the GEMM rate | step of 8 tokens, ms | of a step of 1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in samples.items():
        short, long, first = (statistics.median(found[w]) for w in WORK)
        floors = []
        for ms, context in ((short, 64 + 48), (long, 2048 + 16)):
            nbytes = facts[name].get("weights", 0) + context * KV * facts[name].get("kv", 0)
            floors.append(f"{nbytes / speed * 1e3 / ms:.2f}" if nbytes else "")
        cells = [f"{short:.2f}", f"{1e3 / short:.1f}", floors[0], f"{long:.2f}", f"{1e3 / long:.1f}", floors[1], f"{first:.2f}"]
        cells.append(f"{PREFILL_FLOPS / rate / first:.2f}")
        one, eight = (statistics.median(found[w]) if w in found else 0.0 for w in VERIFY)
        cells += [f"{eight:.2f}", f"{eight / one:.2f}"] if one else ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    raw = {"bandwidth": bandwidths, "gemm": rates, "samples": samples, "facts": facts}
    return "\n".join([*lines, "", "Raw samples:", "", "```json", json.dumps(raw), "```", ""])


if __name__ == "__main__":
    main()
