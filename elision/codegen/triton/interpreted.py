"""Triton's interpreter, under which kernels are tested without a GPU (``TRITON_INTERPRET=1`` before triton is imported)."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from elision.ir.launch import Kernel

#: Whether kernels are interpreted; they may read it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _mend() -> None:
    """Its scalars are arrays of one element, which numpy from 2.4 on refuses to turn into integers: bounds of loops would
    fail. And what a comparison of scalars gives becomes a tile of integers, which Triton from 3.9 on refuses as a mask."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang_tensor

    def mended(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def splat(builder: Any, type: Any, given: Any) -> Any:
        return interpreter.TensorHandle(np.full(type.shape, given.data.item(), given.data.dtype), given.dtype.scalar)

    interpreter._patch_lang_tensor = mended  # type: ignore[assignment]
    interpreter.InterpreterBuilder.create_splat = splat  # type: ignore[method-assign]


if INTERPRETED.value:
    _mend()


class Interpreted:
    """A device that is this machine's memory and Triton's interpreter (`elision.runtime.cuda.device.Device`). Slow; for tests."""

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self._kernels, self._memory, self.launches = kernels, dict[int, torch.Tensor](), Counter[str]()

    def allocate(self, nbytes: int) -> int:
        memory = torch.zeros(nbytes + 256, dtype=torch.uint8)
        address = -(-memory.data_ptr() // 256) * 256
        self._memory[address] = memory
        return address

    def free(self, address: int) -> None:
        del self._memory[address]

    def write(self, address: int, data: torch.Tensor) -> None:
        ctypes.memmove(address, data.data_ptr(), data.numel() * data.element_size())

    def read(self, address: int, into: torch.Tensor) -> None:
        ctypes.memmove(into.data_ptr(), address, into.numel() * into.element_size())

    def clear(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0, nbytes)

    def copy(self, target: int, source: int, times: int, nbytes: int, apart: int, source_apart: int) -> None:
        for i in range(times):
            ctypes.memmove(target + i * apart, source + i * source_apart, nbytes)

    def launch(self, kernel: str, grid: Sequence[int], args: Sequence[int | float]) -> None:
        from elision.codegen.triton.templates import TEMPLATES, constants

        found = self._kernels[kernel]
        given = {n: _pointer(a, t) if t.startswith("*") else a for (n, t), a in zip(found.types.items(), args, strict=True)}
        self.launches[found.template] += 1
        TEMPLATES[found.template][tuple(grid)](**given, **constants(found))

    def wait(self) -> None:
        """Nothing is ever left to be done."""

    def record(self, launches: Callable[[], None]) -> Callable[[], None]:
        return launches


_TYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64,
    "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8,
}  # fmt: skip


def _pointer(address: int | float, type: str) -> torch.Tensor:
    """A tensor that begins there; the interpreter takes no more of it than its address and type."""
    dtype = _TYPES[type.removeprefix("*").removesuffix(":16")]
    return torch.frombuffer((ctypes.c_uint8 * dtype.itemsize).from_address(int(address)), dtype=dtype)
