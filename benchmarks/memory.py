"""Loading an artefact: time to the first token, and memory of the process over weights and states.

    python benchmarks/memory.py [ARTEFACT]        (SmolLM2 is compiled and saved first where none is given)

In a process of its own, after importing torch and Elision's runtime. Memory is `Pss_Anon` of /proc/self/smaps_rollup, what
belongs to this process alone; the mapped weights are pages of the file (`Pss_File`) and not in it, the states are.
The peak is sampled every 2 ms by a thread.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon"))


def measure(path: str, verify: bool) -> None:
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
    states = model.stats.state_bytes
    print(
        f"verify={verify}: open {opened:.2f} s, first token after {first:.2f} s; anonymous memory +{over / 1e6:.1f} MB at its "
        f"peak, of it {states / 1e6:.1f} MB of states"
    )


def main() -> None:
    if len(sys.argv) == 3:
        measure(sys.argv[1], sys.argv[2] == "True")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[1] if len(sys.argv) == 2 else f"{folder}/smollm2.elision"
        if len(sys.argv) == 1:
            import elision

            elision.compile("smollm2").save(path)
        for verify in (True, True, False):
            subprocess.run([sys.executable, __file__, path, str(verify)], check=True)


if __name__ == "__main__":
    main()
