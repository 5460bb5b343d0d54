"""Loading an artefact: time to the first token, and memory of the process over weights and states.

    python benchmarks/memory.py [ARTEFACT ..] [--raw FILE.jsonl]

Where no artefact is given, SmolLM2 is compiled with weights of several formats and saved first. An artefact is opened three
times, the last time without verifying it; the first time brings its file into memory and is not told. Each time is in a process
of its own, after importing torch and Elision's runtime. Memory is `Pss_Anon` of /proc/self/smaps_rollup, what
belongs to this process alone; the mapped weights are pages of the file (`Pss_File`) and not in it, the states are.
The peak is sampled every 2 ms by a thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

FORMATS = {"fp32": [], "bf16": ["bf16"], "int8 a8": ["int8", "a8"], "Q4_1 a8": ["stored", "a8"]}


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon"))


def measure(path: str, verify: bool) -> dict[str, Any]:
    """Seconds until it is open and until the first token, bytes over those before at their peak, of them of states."""
    import torch

    from elision.runtime.artefact import load
    from elision.runtime.model import Model  # noqa: F401

    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = load(path, verify=verify)
    opened = time.perf_counter() - start
    model.generate(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), max_new_tokens=1, eos_token_id=[])
    first = time.perf_counter() - start
    model.generate(torch.arange(1, 65)[None], max_new_tokens=32, eos_token_id=[])
    done.set()
    watcher.join()
    assert model.stats is not None
    over = max(peak[0], anonymous()) - before
    return {
        "verify": verify, "open": opened, "first": first, "over": over, "states": model.stats.state_bytes,
        "file": Path(path).stat().st_size,
    }  # fmt: skip


def rows(name: str, path: str) -> list[dict[str, Any]]:
    """What is measured of an artefact, in processes of their own."""
    found = []
    for verify in (True, True, False):
        command = [sys.executable, __file__, path, "--one", str(verify)]
        found.append({"format": name} | json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefacts", nargs="*")
    parser.add_argument("--one", choices=["True", "False"], help=argparse.SUPPRESS)
    parser.add_argument("--raw", type=Path, help="where a line of JSON is appended for every time")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.artefacts[0], args.one == "True")))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = {Path(path).stem: path for path in args.artefacts}
        if not paths:
            import elision

            for name, passes in FORMATS.items():
                paths[name] = f"{folder}/{name}.elision"
                elision.compile("smollm2", passes).save(paths[name])
        for name, path in paths.items():
            for row in rows(name, path):
                over, states, size = (row[x] / 1e6 for x in ("over", "states", "file"))
                print(
                    f"{name}, verify={row['verify']}: {size:.1f} MB, open {row['open']:.2f} s, first token after "
                    f"{row['first']:.2f} s; memory +{over:.1f} MB at its peak, of it {states:.1f} of states"
                )
                if args.raw:
                    with args.raw.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
