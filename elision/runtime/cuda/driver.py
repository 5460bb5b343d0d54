"""NVIDIA's driver through ctypes (CUDA Driver API): machine code, memory, one stream, graphs. It needs no toolkit and no
triton."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

import torch

from elision.errors import BadInput
from elision.ir.launch import Binary, DeviceCode
from elision.runtime.cuda.device import Number

LIBRARY = "libcuda.so.1"
# CUdevice_attribute, CUfunction_attribute and CUstreamCaptureMode of cuda.h.
_MAJOR, _MINOR, _DYNAMIC_SHARED, _THREAD_LOCAL = 75, 76, 8, 1
_NUMBERS: dict[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def open_driver() -> Any:
    """The driver's library. Raises BadInput where there is none."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as err:
        raise BadInput(f"no NVIDIA driver here ({LIBRARY}: {err}); run on a machine with one, or use target='cpu'") from err


class Cuda:
    """The first GPU of this process with the kernels of a program. A `Device`.

    Raises BadInput without a driver or GPU, and (naming the targets there are) without machine code for its processor.
    """

    def __init__(self, code: DeviceCode, library: Any = None) -> None:
        self._library = open_driver() if library is None else library
        self._context: c_void_p | None = None
        self._late: list[int] | None = None  # what is freed while launches are recorded, which forbids it: objects go at any time
        self._here = threading.local()  # whether the context is that of the thread, which each has to say
        self._turn = threading.RLock()  # what another thread asked for while launches are recorded would be recorded too
        self._do("cuInit", 0)
        device, context, stream = c_int(), c_void_p(), c_void_p()
        self._do("cuDeviceGetCount", byref(device))
        if device.value < 1:
            raise BadInput("there is an NVIDIA driver here but no GPU; use target='cpu'")
        self._do("cuDeviceGet", byref(device), 0)
        self.target, binaries = _fitting(code.binaries, *capability(self._library))
        self._do("cuDevicePrimaryCtxRetain", byref(context), device)
        self._context = context
        self._do("cuStreamCreate", byref(stream), 1)  # waits for no other stream
        self._stream, self._kernels, self._functions = stream, code.kernels, dict[str, c_void_p]()
        self._binaries = binaries
        self._scratch = c_uint64(0)  # kernels here ask for none, but their last two parameters are its addresses

    def _do(self, name: str, *args: Any) -> None:
        """Call the driver, from any thread. Raises RuntimeError with its own words if it fails."""
        if self._context is not None and not hasattr(self._here, "set"):
            self._here.set = True
            self._do("cuCtxSetCurrent", self._context)
        with self._turn:
            status = getattr(self._library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'error %d' % status).decode()}")

    def allocate(self, nbytes: int) -> int:
        address = c_uint64()
        self._do("cuMemAlloc_v2", byref(address), c_size_t(max(nbytes, 1)))
        self.clear(address.value, nbytes)
        return address.value

    def free(self, address: int) -> None:
        with self._turn:
            if self._late is None:
                self._do("cuMemFree_v2", c_uint64(address))
            else:
                self._late.append(address)

    def write(self, address: int, data: torch.Tensor) -> None:
        if data.numel():
            size = c_size_t(data.numel() * data.element_size())
            self._do("cuMemcpyHtoDAsync_v2", c_uint64(address), c_void_p(data.data_ptr()), size, self._stream)
            self.wait()  # the tensor may go now

    def read(self, address: int, into: torch.Tensor) -> None:
        if into.numel():
            size = c_size_t(into.numel() * into.element_size())
            self._do("cuMemcpyDtoHAsync_v2", c_void_p(into.data_ptr()), c_uint64(address), size, self._stream)
            self.wait()

    def clear(self, address: int, nbytes: int) -> None:
        if nbytes:
            self._do("cuMemsetD8Async", c_uint64(address), ctypes.c_ubyte(0), c_size_t(nbytes), self._stream)

    def copy(self, target: int, source: int, times: int, nbytes: int, apart: int, source_apart: int) -> None:
        for i in range(times if nbytes else 0):
            to, frm = c_uint64(target + i * apart), c_uint64(source + i * source_apart)
            self._do("cuMemcpyDtoDAsync_v2", to, frm, c_size_t(nbytes), self._stream)

    def wait(self) -> None:
        """Until everything that was asked for is done."""
        self._do("cuStreamSynchronize", self._stream)

    def launch(self, kernel: str, grid: Sequence[int], args: Sequence[Number]) -> None:
        made = self._binaries[kernel]
        words = [_word(t, a) for t, a in zip(self._kernels[kernel].types.values(), args, strict=True)]
        words += [self._scratch, self._scratch]
        pointers = (c_void_p * len(words))(*(ctypes.addressof(w) for w in words))
        sizes = [c_uint(n) for n in (*grid, 1, 1)[:3]]
        threads = (c_uint(made.threads), c_uint(1), c_uint(1))
        self._do("cuLaunchKernel", self._function(kernel), *sizes, *threads, c_uint(made.shared), self._stream, pointers, None)

    def _function(self, kernel: str) -> c_void_p:
        """A kernel's function; its machine code is loaded at the first launch."""
        if kernel not in self._functions:
            made, module, function = self._binaries[kernel], c_void_p(), c_void_p()
            self._do("cuModuleLoadData", byref(module), ctypes.c_char_p(made.code))
            self._do("cuModuleGetFunction", byref(function), module, ctypes.c_char_p(made.symbol.encode()))
            if made.shared > 48 << 10:  # more than a program has without asking
                self._do("cuFuncSetAttribute", function, c_int(_DYNAMIC_SHARED), c_int(made.shared))
            self._functions[kernel] = function
        return self._functions[kernel]

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        for name in self._kernels:  # modules cannot be loaded while launches are captured
            self._function(name)
        graph, ready = c_void_p(), c_void_p()
        with self._turn:
            late: list[int] = []
            self._do("cuStreamBeginCapture_v2", self._stream, c_int(_THREAD_LOCAL))
            self._late = late
            try:
                launches()
            finally:
                self._do("cuStreamEndCapture", self._stream, byref(graph))
                self._late = None
                for address in late:
                    self.free(address)
        self._do("cuGraphInstantiateWithFlags", byref(ready), graph, ctypes.c_ulonglong(0))
        self._do("cuGraphDestroy", graph)

        def start() -> None:
            self._do("cuGraphLaunch", ready, self._stream)

        weakref.finalize(start, self._do, "cuGraphExecDestroy", ready).atexit = False  # the device may be gone by then
        return start


def capability(library: Any = None) -> tuple[int, int]:
    """The generation of the first GPU and its revision: (9, 0) is sm_90. Raises BadInput without a driver or GPU."""
    found, device, value = [], c_int(), c_int()
    library = open_driver() if library is None else library
    if library.cuInit(0) or library.cuDeviceGet(byref(device), 0):
        raise BadInput("there is an NVIDIA driver here but no GPU; use target='cpu'")
    for attribute in (_MAJOR, _MINOR):
        library.cuDeviceGetAttribute(byref(value), attribute, device)
        found.append(value.value)
    return found[0], found[1]


def device_name(library: Any) -> str:
    """What the first GPU is called, once `capability` has been asked."""
    device, text = c_int(), ctypes.create_string_buffer(256)
    library.cuDeviceGet(byref(device), 0)
    library.cuDeviceGetName(text, c_int(len(text)), device)
    return text.value.decode()


def _word(type: str, value: Number) -> Any:
    """A parameter as the driver takes it."""
    plain = type.removesuffix(":16")
    return c_uint64(int(value)) if plain.startswith("*") else _NUMBERS[plain](value)


def _fitting(binaries: Mapping[str, Mapping[str, Binary]], major: int, minor: int) -> tuple[str, Mapping[str, Binary]]:
    """The machine code for a processor: a cubin runs on its own generation from its own revision on."""
    found = {}
    for target, made in binaries.items():
        arch = target.removeprefix("cuda:sm_")
        if arch.isdigit() and int(arch) // 10 == major and int(arch) % 10 <= minor:
            found[int(arch)] = target, made
    if not found:
        there = ", ".join(binaries) or "none"
        here = f"sm_{major}{minor}"
        raise BadInput(f"no machine code for this GPU ({here}), only for: {there}; compile with --target cuda:{here}")
    return found[max(found)]
