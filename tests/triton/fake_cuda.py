"""NVIDIA's driver for tests: what it is asked for is recorded and checked, memory is the host's, kernels run under Triton's
interpreter.

A module's machine code is taken for the name of its kernel."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from typing import Any

from elision.codegen.triton.interpreted import Interpreted
from elision.ir.launch import Binary, DeviceCode

_SIZES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def named(code: DeviceCode, *targets: str) -> DeviceCode:
    """Machine code that says which kernel it is, for the fake driver."""
    for target in targets or ("cuda:sm_90",):
        code.binaries[target] = {n: Binary(f"symbol of {n}", n.encode(), 32 * k.warps, 64 << 10) for n, k in code.kernels.items()}
    return code


class FakeCuda:
    """The functions of libcuda that `elision.runtime.cuda.driver` calls, on a GPU of revision ``capability``."""

    def __init__(self, code: DeviceCode, capability: tuple[int, int] = (9, 0), gpus: int = 1) -> None:
        self.code, self.capability, self.gpus = code, capability, gpus
        self.device, self.calls, self.names = Interpreted(code.kernels), Counter[str](), [""]
        self.capturing: list[Any] | None = None
        self.graphs: list[list[Any]] = [[]]
        self.fails = ""
        self.threads: set[int] = set()  # those with a context

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> int:
            self.calls[name] += 1
            asks = name.startswith(("cuMem", "cuStream", "cuGraph", "cuLaunch", "cuModule"))
            assert not asks or threading.get_ident() in self.threads, f"{name} without context"
            return 1 if name == self.fails else int(getattr(self, f"do_{name}", lambda *_: 0)(*args) or 0)

        if not name.startswith("cu"):
            raise AttributeError(name)
        return call

    def do_cuGetErrorString(self, status: int, text: Any) -> None:
        text._obj.value = b"out of memory"

    def do_cuCtxSetCurrent(self, context: Any) -> None:
        self.threads.add(threading.get_ident())

    def do_cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = self.gpus

    def do_cuDeviceGetName(self, text: Any, size: Any, device: Any) -> None:
        text.value = b"Made Up"

    def do_cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> None:
        value._obj.value = self.capability[attribute - 75]

    def do_cuMemAlloc_v2(self, address: Any, size: Any) -> None:
        address._obj.value = self.device.allocate(size.value)

    def do_cuMemFree_v2(self, address: Any) -> None:
        assert self.capturing is None, "memory cannot be freed while launches are captured"
        self.device.free(address.value)

    def do_cuMemsetD8Async(self, address: Any, byte: Any, size: Any, stream: Any) -> None:
        assert self.capturing is None, "only launches are captured"
        ctypes.memset(address.value, byte.value, size.value)

    def do_cuMemcpyHtoDAsync_v2(self, address: Any, source: Any, size: Any, stream: Any) -> None:
        assert self.capturing is None, "only launches are captured"
        ctypes.memmove(address.value, source.value, size.value)

    def do_cuMemcpyDtoHAsync_v2(self, target: Any, address: Any, size: Any, stream: Any) -> None:
        assert self.capturing is None, "a graph is recorded without asking the device"
        ctypes.memmove(target.value, address.value, size.value)

    def do_cuMemcpyDtoDAsync_v2(self, target: Any, source: Any, size: Any, stream: Any) -> None:
        assert self.capturing is None, "only launches are captured"
        ctypes.memmove(target.value, source.value, size.value)

    def do_cuModuleLoadData(self, module: Any, code: Any) -> None:
        assert self.capturing is None, "modules cannot be loaded while launches are captured"
        self.names.append(code.value.decode())
        module._obj.value = len(self.names) - 1

    def do_cuModuleGetFunction(self, function: Any, module: Any, symbol: Any) -> None:
        assert symbol.value.decode() == f"symbol of {self.names[module.value]}"
        function._obj.value = module.value

    def do_cuLaunchKernel(self, function: Any, *rest: Any) -> None:
        *sizes, shared, stream, parameters, extra = rest
        name = self.names[function.value]
        kernel, grid, threads = self.code.kernels[name], [s.value for s in sizes[:3]], [s.value for s in sizes[3:]]
        made = self.code.binaries["cuda:sm_90"][name]
        assert threads == [made.threads, 1, 1] and shared.value == made.shared and min(grid) >= 1
        assert len(parameters) == len(kernel.types) + 2, "two addresses of scratch memory come last"
        words = []
        for place, type in zip(parameters, kernel.types.values(), strict=False):
            plain = type.removesuffix(":16")
            words.append((_SIZES[plain] if plain in _SIZES else ctypes.c_uint64).from_address(place).value)
            assert not type.endswith(":16") or words[-1] % 16 == 0, f"{name} was promised a multiple of 16"
        launch = (name, grid, words)
        if self.capturing is not None:
            self.capturing.append(launch)
        else:
            self.device.launch(*launch)

    def do_cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> None:
        self.capturing = []

    def do_cuStreamEndCapture(self, stream: Any, graph: Any) -> None:
        self.graphs.append(self.capturing or [])
        self.capturing = None
        graph._obj.value = len(self.graphs) - 1

    def do_cuGraphInstantiateWithFlags(self, ready: Any, graph: Any, flags: Any) -> None:
        ready._obj.value = graph.value

    def do_cuGraphLaunch(self, ready: Any, stream: Any) -> None:
        for launch in self.graphs[ready.value]:
            self.device.launch(*launch)
