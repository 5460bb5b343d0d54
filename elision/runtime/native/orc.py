"""Loading machine code: an object file becomes functions, through LLVM's just-in-time linker. MLIR is not imported."""

from __future__ import annotations

import contextlib
import ctypes
import functools

from elision import llvm
from elision.errors import ArtefactError

_POINTER = llvm.POINTER


class Code:
    """The functions of one object file, by name. Stays loaded as long as the process."""

    def __init__(self, data: bytes) -> None:
        _find_halves()
        api = llvm.library()
        self._jit = _POINTER()
        _check(api.LLVMOrcCreateLLJIT(ctypes.byref(self._jit), None))
        library = _POINTER(api.LLVMOrcLLJITGetMainJITDylib(self._jit))
        generator = _POINTER()
        prefix = api.LLVMOrcLLJITGetGlobalPrefix(self._jit)
        _check(api.LLVMOrcCreateDynamicLibrarySearchGeneratorForProcess(ctypes.byref(generator), prefix, None, None))
        api.LLVMOrcJITDylibAddGenerator(library, generator)
        _check(api.LLVMOrcLLJITAddObjectFile(self._jit, library, llvm.buffer(data)))

    def address(self, name: str) -> int:
        """Where a function is. Raises ArtefactError if the object has none of that name."""
        found = ctypes.c_uint64()
        _check(llvm.library().LLVMOrcLLJITLookup(self._jit, ctypes.byref(found), name.encode()))
        return found.value


@functools.cache
def _find_halves() -> None:
    """Code for processors without f16c converts floats of 16 bits by functions of the compiler's library, which the linker looks
    for in this process (where there is no such library, it says what it misses)."""
    with contextlib.suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1", ctypes.RTLD_GLOBAL)


@functools.cache
def load(data: bytes) -> Code:
    """The functions of an object file; loaded once in a process, whatever number of models has it."""
    return Code(data)


def _check(error: int | None) -> None:
    if error:
        raise ArtefactError(f"native code cannot be loaded: {llvm.message(error)}; compile the model again")
