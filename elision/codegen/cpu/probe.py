"""What the machine can do, measured with native code: how fast memory is read by the threads that compute."""

from __future__ import annotations

import time

import numpy as np

from elision.codegen.cpu.driver import driver
from elision.codegen.cpu.emit import VF
from elision.codegen.cpu.kernel import Kernel
from elision.codegen.cpu.lower import to_object
from elision.ir import schedule as abi

_UNROLL = 8


def reading() -> Kernel:
    """Every thread adds up its part of ``count`` lines of 256 bytes, so that nothing but reading takes time."""
    kernel = Kernel("reading")
    fn = kernel.fn
    data, out, count = kernel.weight("data"), kernel.tensor("out"), kernel.integer("count")
    low, high = kernel.part(count)
    zero = fn.const(0.0, VF)
    with fn.loop(low, high, 1, [zero] * _UNROLL) as loop:
        base = fn.at(data, loop.index * (_UNROLL * 32))
        loop.give(*(fn.load(base, VF, i * 8, "f32") + c for i, c in enumerate(loop.carried)))
    total = loop.results[0]
    for more in loop.results[1:]:
        total = total + more
    fn.store(total, out.base)
    return kernel


class Bandwidth:
    """Reads ``nbytes`` of memory again and again with ``threads`` threads."""

    def __init__(self, threads: int, nbytes: int = 512 << 20) -> None:
        from elision.llvm.processor import host_level
        from elision.runtime.native.orc import Code
        from elision.runtime.native.pool import pool

        code = Code(to_object(driver() + reading().text(), host_level()))
        self._pool, lines = pool(threads, code), nbytes // 256
        self._data, self._out = np.ones(lines * 64, np.float32), np.zeros(threads * 16, np.float32)
        self._nbytes = lines * 256
        self._table = np.zeros((2, abi.WORDS), np.int64)
        self._table[0, :7] = [code.address("reading"), 0, self._data.ctypes.data, self._out.ctypes.data, 64, 0, lines]
        self._context = np.zeros(abi.CONTEXT_WORDS, np.int64)
        self._context[abi.THREADS], self._context[abi.TABLE] = threads, self._table.ctypes.data

    def measure(self, runs: int = 5) -> float:
        """Bytes per second, the median of ``runs`` runs."""
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            self._pool.run(self._context.ctypes.data, 0)
            times.append(time.perf_counter() - start)
        return self._nbytes / sorted(times)[runs // 2]
