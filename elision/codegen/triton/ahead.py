"""Ahead of time: kernels to machine code for GPUs that need not be there, in processes that share the work."""

from __future__ import annotations

import base64
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from elision.codegen.triton.targets import checked
from elision.errors import BadInput
from elision.ir.launch import Binary, DeviceCode, Kernel

log = logging.getLogger("elision")


def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def build(code: DeviceCode, targets: Sequence[str], workers: int | None = None) -> None:
    """Compile every kernel for every target into ``code.binaries``, with ``workers`` processes (by default two at most).

    Raises BadInput without Triton, for a target that it does not know, and for a kernel that it cannot compile.
    """
    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    for target in map(checked, targets):
        code.binaries[target] = {}
        for name, kernel in sorted(code.kernels.items(), key=lambda item: -_weight(item[1])):
            jobs.put({"name": name, "target": target, "kernel": asdict(kernel)})
    count = workers or min(2, os.cpu_count() or 1)
    answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threads = [threading.Thread(target=_serve, args=(jobs, answers), daemon=True) for _ in range(count)]
    for _ in threads:
        jobs.put(None)
    for thread in threads:
        thread.start()
    for _ in range(len(code.kernels) * len(targets)):
        answer = answers.get()
        if "error" in answer:
            while not jobs.empty():  # the others stop too
                jobs.get()
            for _ in threads:
                jobs.put(None)
            raise BadInput(f"{answer['name']} for {answer['target']} was not compiled: {answer['error']}")
        made = {k: v for k, v in answer.items() if k not in ("name", "target", "code")}
        code.binaries[answer["target"]][answer["name"]] = Binary(code=base64.b64decode(answer["code"]), **made)
    for target in targets:
        code.binaries[target] = {name: code.binaries[target][name] for name in code.kernels}
        log.info("compiled %d kernels for %s", len(code.kernels), target)


def _weight(kernel: Kernel) -> int:
    """What takes longest comes first, so that processes end together."""
    return {"attend": 3, "project": 3, "gemm": 2, "gemv": 1}.get(kernel.template, 0)


def _serve(jobs: queue.SimpleQueue[dict[str, Any] | None], answers: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Give jobs to one process until there are no more."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "elision.codegen.triton.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdin is not None and process.stdout is not None
        while (job := jobs.get()) is not None:
            try:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            failed = {"name": job["name"], "target": job["target"], "error": "the compiler ended"}
            answers.put(json.loads(line) if line else failed)
        process.stdin.close()


def totals(code: DeviceCode, target: str) -> dict[str, int]:
    """Of all kernels for a target: how many, their bytes, the most registers and shared memory, the bytes that are spilled."""
    found = code.binaries[target].values()
    return {
        "kernels": len(found),
        "bytes": sum(len(b.code) for b in found),
        "registers": max((b.registers for b in found), default=0),
        "shared": max((b.shared for b in found), default=0),
        "spilling": sum(b.spills > 0 for b in found),
        "spills": sum(max(b.spills, 0) for b in found),
    }
