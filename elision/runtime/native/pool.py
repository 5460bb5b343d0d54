"""The threads that run native code: they wait inside it, so that starting a run costs no Python and no system call.

There is one pool per number of threads in a process, whatever number of models uses it; runs take turns. After a fork the child
makes its own.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading

import numpy as np

from elision.runtime.native.orc import Code

_WORDS = 64
_pools: dict[int, Pool] = {}
_lock = threading.Lock()


class Pool:
    """``threads`` threads, the caller's among them; ``code`` holds ``worker``, ``launch`` and ``shutdown``."""

    def __init__(self, threads: int, code: Code) -> None:
        self.threads, self._code = threads, code
        self._memory = np.zeros(_WORDS + 8, np.int64)
        offset = (-self._memory.ctypes.data % 64) // 8
        self._pool = self._memory[offset:].ctypes.data
        self._launch = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(code.address("launch"))
        worker = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(code.address("worker"))
        self._turn = threading.Lock()
        self._workers = [
            threading.Thread(target=worker, args=(self._pool, i), name=f"elision-{i}", daemon=True) for i in range(1, threads)
        ]
        for thread in self._workers:
            thread.start()

    def run(self, context: int, start: int) -> int:
        """Walk the table of a context from row ``start`` on, with all threads; the row where it ended."""
        with self._turn:
            return int(self._launch(self._pool, context, start))

    def close(self) -> None:
        """End the workers."""
        with self._turn:
            ctypes.CFUNCTYPE(None, ctypes.c_int64)(self._code.address("shutdown"))(self._pool)
        for thread in self._workers:
            thread.join()


def pool(threads: int, code: Code) -> Pool:
    """The process's pool of that many threads, started with ``code`` if there is none."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = Pool(threads, code)
        return _pools[threads]


@atexit.register
def _close() -> None:
    for found in list(_pools.values()):
        found.close()
    _pools.clear()


def _forget() -> None:
    """In the child of a fork the workers are gone: leave their pools behind."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def physical_cores() -> int:
    """Physical cores that this process may use (two hardware threads of one count once)."""
    try:
        allowed = os.sched_getaffinity(0)
        cores = set()
        for cpu in allowed:
            folder = f"/sys/devices/system/cpu/cpu{cpu}/topology"
            with open(f"{folder}/physical_package_id") as package, open(f"{folder}/core_id") as core:
                cores.add((package.read().strip(), core.read().strip()))
        return len(cores) or 1
    except (OSError, AttributeError):
        return os.cpu_count() or 1
